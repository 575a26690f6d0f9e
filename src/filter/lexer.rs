//! The tokens of an expression, and its faults: the building blocks of the grammar in [`super::parse()`].

use std::ops::Range;

use winnow::combinator::{alt, preceded};
use winnow::error::{ErrMode, ParserError};
use winnow::prelude::*;
use winnow::stream::{LocatingSlice, Location, Stateful, Stream};
use winnow::token::take_while;

use super::Services;
use super::syntax_error::quoted;

pub(super) type Input<'i> = Stateful<LocatingSlice<&'i str>, State<'i>>;
pub(super) type ParseResult<T> = ModalResult<T, Fault>;

/// The state of the parser.
#[derive(Clone, Copy, Debug)]
pub(super) struct State<'i> {
    pub(super) services: &'i Services,
    /// The number of open parentheses.
    pub(super) depth: usize,
    /// The offset of the first `and` that follows an `or` without parentheses.
    pub(super) ambiguous_and: Option<usize>,
}

/// A fault in an expression.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) span: Range<usize>,
    pub(super) message: String,
    pub(super) example: String,
}

impl ParserError<Input<'_>> for Fault {
    type Inner = Self;

    fn from_input(input: &Input<'_>) -> Self {
        let start = input.current_token_start();
        Fault {
            span: start..start,
            ..Fault::default()
        }
    }

    fn into_inner(self) -> Result<Self, Self> {
        Ok(self)
    }
}

impl Fault {
    pub(super) fn new(
        span: Range<usize>,
        message: impl Into<String>,
        example: impl Into<String>,
    ) -> ErrMode<Self> {
        ErrMode::Cut(Fault {
            span,
            message: message.into(),
            example: example.into(),
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token<'i> {
    Open,
    Close,
    And,
    Or,
    Not,
    Compare(Comparison),
    Word(&'i str),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

/// A token with its text and its place in the expression.
#[derive(Clone, Debug)]
pub(super) struct Lexeme<'i> {
    pub(super) token: Token<'i>,
    pub(super) text: &'i str,
    pub(super) span: Range<usize>,
}

fn lexeme<'i>(input: &mut Input<'i>) -> ParseResult<Lexeme<'i>> {
    use Comparison::*;
    let comparison = alt((
        alt(("==", "=")).value(Equal),
        "!=".value(NotEqual),
        "<=".value(LessOrEqual),
        "<".value(Less),
        ">=".value(GreaterOrEqual),
        ">".value(Greater),
    ));
    let token = alt((
        "(".value(Token::Open),
        ")".value(Token::Close),
        alt(("&&", "&")).value(Token::And),
        alt(("||", "|")).value(Token::Or),
        comparison.map(Token::Compare),
        "!".value(Token::Not),
        take_while(1.., |c: char| !c.is_whitespace() && !"()&|=!<>".contains(c)).map(word),
    ));
    let ((token, text), span) = token.with_taken().with_span().parse_next(input)?;
    Ok(Lexeme { token, text, span })
}

/// A word is an operator or a plain word.
fn word(text: &str) -> Token<'_> {
    use Comparison::*;
    match text {
        "and" => Token::And,
        "or" => Token::Or,
        "not" => Token::Not,
        "eq" => Token::Compare(Equal),
        "ne" | "neq" => Token::Compare(NotEqual),
        "lt" => Token::Compare(Less),
        "le" | "leq" => Token::Compare(LessOrEqual),
        "gt" => Token::Compare(Greater),
        "ge" | "geq" => Token::Compare(GreaterOrEqual),
        _ => Token::Word(text),
    }
}

/// Takes the next token; `None` at the end.
pub(super) fn next<'i>(input: &mut Input<'i>) -> Option<Lexeme<'i>> {
    preceded(take_while(0.., char::is_whitespace), lexeme)
        .parse_next(input)
        .ok()
}

/// Returns the next token without taking it.
pub(super) fn peek<'i>(input: &mut Input<'i>) -> Option<Lexeme<'i>> {
    let before = input.checkpoint();
    let lexeme = next(input);
    input.reset(&before);
    lexeme
}

/// Takes the next token if it is `token`, and returns whether it was.
pub(super) fn take(input: &mut Input<'_>, token: Token<'_>) -> bool {
    let is_next = peek(input).is_some_and(|lexeme| lexeme.token == token);
    if is_next {
        next(input);
    }
    is_next
}

/// The empty span at the end of the expression.
pub(super) fn end(input: &Input<'_>) -> Range<usize> {
    let rest: &str = input.input.as_ref();
    let end = input.current_token_start() + rest.len();
    end..end
}

/// Takes the value of a condition; `noun` names it in the message if it is missing.
pub(super) fn value<'i>(
    input: &mut Input<'i>,
    noun: &str,
    example: &str,
) -> ParseResult<(&'i str, Range<usize>)> {
    match peek(input) {
        Some(Lexeme {
            token: Token::Word(text),
            span,
            ..
        }) => {
            next(input);
            Ok((text, span))
        }
        Some(other) => {
            let message = format!("{noun} is missing before {}", quoted(other.text));
            Err(Fault::new(other.span, message, example))
        }
        None => {
            let message = format!("{noun} is missing at the end");
            Err(Fault::new(end(input), message, example))
        }
    }
}

/// Takes a comparison. The default is `=`.
pub(super) fn comparison(input: &mut Input<'_>) -> (Comparison, Range<usize>) {
    match peek(input) {
        Some(Lexeme {
            token: Token::Compare(comparison),
            span,
            ..
        }) => {
            next(input);
            (comparison, span)
        }
        _ => (Comparison::Equal, end(input)),
    }
}

/// Takes `=` or `!=`, for values without an order; true for `!=`.
pub(super) fn unequal(input: &mut Input<'_>, keyword: &str, example: &str) -> ParseResult<bool> {
    match comparison(input) {
        (Comparison::Equal, _) => Ok(false),
        (Comparison::NotEqual, _) => Ok(true),
        (_, span) => {
            let message = format!("`{keyword}` has no order: only = and != compare it");
            Err(Fault::new(span, message, example))
        }
    }
}

/// Parses a port: a number, or the name of its service.
pub(super) fn port_number(
    services: &Services,
    text: &str,
    span: Range<usize>,
    example: &str,
) -> ParseResult<u16> {
    let fault = |message: String| Err(Fault::new(span.clone(), message, example));
    if text.is_empty() {
        return fault("a port is missing after the colon".into());
    }
    if text.bytes().all(|byte| byte.is_ascii_digit()) {
        return match text.parse() {
            // ss reads a number with a leading zero as octal.
            Ok(port) if port == 0 || !text.starts_with('0') => Ok(port),
            Ok(_) => fault(format!("{} begins with a zero", quoted(text))),
            Err(_) => fault(format!(
                "{} is not a port: the highest is 65535",
                quoted(text)
            )),
        };
    }
    match services.port(text) {
        Some(port) => Ok(port),
        None => fault(format!(
            "{} is neither a port nor a service in /etc/services",
            quoted(text)
        )),
    }
}
