//! The grammar.
//!
//! ```text
//! expression := list
//! list       := states [and] chain | chain
//! chain      := term { [and | or] term }        from left to right, as in ss
//! term       := { not } ( "(" list ")" | states | condition )
//! states     := ( state | exclude ) STATE { ( state | exclude ) STATE }
//! condition  := ( sport | dport ) [comparison] [:]PORT
//!             | ( src | dst ) [= | !=] HOST
//!             | dev [= | !=] INTERFACE
//!             | cgroup [= | !=] PATH
//!             | autobound
//! HOST       := ( ADDRESS[/LENGTH] | "[" ADDRESS[/LENGTH] "]" | * )[:PORT] | :PORT
//! ```
//!
//! If a list begins with states, they apply to all of it, as in `ss state close-wait EXPRESSION`.
//!
//! Source: iproute2, misc/ssfilter.y, and parse_hostcond in misc/ss.c. docs/decisions/expressions.md lists the differences.

use std::ops::Range;

use winnow::error::ErrMode;
use winnow::stream::{LocatingSlice, Stream};

use super::lexer::{
    Comparison, Fault, Input, Lexeme, ParseResult, State, Token, comparison, end, next, peek,
    port_number, take, unequal, value,
};
use super::syntax_error::quoted;
use super::{
    Cgroup2, End, Ephemeral, Expression, Interface, MAX_DEPTH, Services, SyntaxError, host,
};
use crate::tcp::{StateSet, TcpState};

/// The result of a parse.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parsed {
    pub expression: Expression,
    /// A note for the operator if the expression may mean something else than intended.
    pub warning: Option<String>,
}

/// Parses `text`.
///
/// # Errors
/// `text` is not in the grammar. The error shows the place and a valid example.
pub fn parse(text: &str, services: &Services) -> Result<Parsed, SyntaxError> {
    let mut input = Input {
        input: LocatingSlice::new(text),
        state: State {
            services,
            depth: 0,
            ambiguous_and: None,
        },
    };
    match whole(&mut input) {
        Ok(expression) => Ok(Parsed {
            expression,
            warning: input.state.ambiguous_and.map(|offset| {
                let column = text[..offset].chars().count() + 1;
                format!(
                    "the `and` at column {column} applies to all that is left of it, as in ss (whose \
                     manual says otherwise): set parentheses to make it plain"
                )
            }),
        }),
        Err(error) => {
            let fault = error.into_inner().unwrap_or_default();
            Err(SyntaxError::new(
                text,
                fault.span,
                fault.message,
                fault.example,
            ))
        }
    }
}

/// A tree with its depth.
struct Subtree {
    tree: Expression,
    depth: usize,
}

impl Subtree {
    fn leaf(tree: Expression) -> Self {
        Subtree { tree, depth: 1 }
    }

    /// Joins `next` on the right. Operators of one kind share a level.
    fn join(self, or: bool, next: Subtree) -> Self {
        let same = match self.tree {
            Expression::All(_) => !or,
            Expression::Any(_) => or,
            _ => false,
        };
        let depth = match same {
            true => self.depth.max(next.depth + 1),
            false => self.depth.max(next.depth) + 1,
        };
        let mut parts = match self.tree {
            Expression::All(parts) if !or => parts,
            Expression::Any(parts) if or => parts,
            other => vec![other],
        };
        parts.push(next.tree);
        let tree = match or {
            true => Expression::Any(parts),
            false => Expression::All(parts),
        };
        Subtree { tree, depth }
    }
}

fn whole(input: &mut Input<'_>) -> ParseResult<Expression> {
    let subtree = list(input)?;
    match next(input) {
        None => Ok(subtree.tree),
        // A list ends only at a `)`.
        Some(close) => Err(Fault::new(
            close.span,
            "this `)` closes nothing",
            "( sport = :80 or sport = :443 ) and dst 10.0.0.0/8",
        )),
    }
}

fn list(input: &mut Input<'_>) -> ParseResult<Subtree> {
    let before = input.checkpoint();
    if peek(input).is_some_and(|lexeme| is_states(&lexeme)) {
        let states = states(input)?;
        match peek(input).map(|lexeme| lexeme.token) {
            None | Some(Token::Close) => return Ok(states),
            // The states are an alternative of an `or`, so they do not apply to the rest.
            Some(Token::Or) => input.reset(&before),
            _ => {
                take(input, Token::And);
                return Ok(states.join(false, chain(input)?));
            }
        }
    }
    chain(input)
}

fn chain(input: &mut Input<'_>) -> ParseResult<Subtree> {
    let mut subtree = term(input)?;
    let mut or_before = false;
    loop {
        let Some(Lexeme { token, span, .. }) = peek(input) else {
            return Ok(subtree);
        };
        let or = token == Token::Or;
        match token {
            Token::Close => return Ok(subtree),
            Token::And | Token::Or => drop(next(input)),
            // Two adjacent terms without an operator mean `and`.
            _ => {}
        }
        or_before |= or;
        if or_before && !or {
            input.state.ambiguous_and.get_or_insert(span.start);
        }
        subtree = subtree.join(or, term(input)?);
        if subtree.depth > MAX_DEPTH {
            return Err(too_deep(span));
        }
    }
}

fn too_deep(span: Range<usize>) -> ErrMode<Fault> {
    Fault::new(
        span,
        format!("nested deeper than {MAX_DEPTH} levels"),
        "( sport = :80 or sport = :443 ) and dst 10.0.0.0/8",
    )
}

fn term(input: &mut Input<'_>) -> ParseResult<Subtree> {
    let mut negated = false;
    while take(input, Token::Not) {
        negated = !negated;
    }
    let subtree = positive(input)?;
    Ok(match negated {
        true => Subtree {
            tree: subtree.tree.negated(),
            depth: subtree.depth + 1,
        },
        false => subtree,
    })
}

const CONDITIONS: &str = "sport = :8080 and dst 10.0.0.0/8";

fn positive(input: &mut Input<'_>) -> ParseResult<Subtree> {
    let Some(first) = peek(input) else {
        return Err(Fault::new(
            end(input),
            "a condition is missing at the end",
            CONDITIONS,
        ));
    };
    if is_states(&first) {
        return states(input);
    }
    next(input);
    let Token::Word(keyword) = first.token else {
        if first.token == Token::Open {
            return in_parentheses(input, first.span);
        }
        let message = format!("a condition is missing before {}", quoted(first.text));
        return Err(Fault::new(first.span, message, CONDITIONS));
    };
    let tree = match keyword {
        "sport" => port(input, End::Local, keyword)?,
        "dport" => port(input, End::Peer, keyword)?,
        "src" => host::condition(input, End::Local, keyword)?,
        "dst" => host::condition(input, End::Peer, keyword)?,
        "dev" => interface(input)?,
        "cgroup" => cgroup(input)?,
        "autobound" => Expression::Autobound(Ephemeral::Unread),
        _ => return Err(unknown(first.span, keyword)),
    };
    Ok(Subtree::leaf(tree))
}

/// Parses from the parenthesis at `open`, which is taken already, to its counterpart.
fn in_parentheses(input: &mut Input<'_>, open: Range<usize>) -> ParseResult<Subtree> {
    input.state.depth += 1;
    if input.state.depth > MAX_DEPTH {
        return Err(too_deep(open));
    }
    let subtree = list(input)?;
    if !take(input, Token::Close) {
        return Err(Fault::new(
            open,
            "this `(` is never closed",
            "( sport = :80 or sport = :443 ) and dst 10.0.0.0/8",
        ));
    }
    input.state.depth -= 1;
    Ok(subtree)
}

/// The fault for a word that does not begin a condition. The example is a guess at the intended condition.
fn unknown(span: Range<usize>, word: &str) -> ErrMode<Fault> {
    let message = format!("{} does not begin a condition", quoted(word));
    let lower = word.to_ascii_lowercase();
    let keywords = [
        "sport", "dport", "src", "dst", "state", "exclude", "and", "or", "not",
    ];
    let example = match word {
        "fwmark" => {
            let message = "`fwmark` is not supported: cwkill does not see the marks of sockets";
            return Fault::new(span, message, CONDITIONS);
        }
        _ if keywords.contains(&lower.as_str()) => format!("{lower}, in lower case"),
        _ if word.parse::<TcpState>().is_ok() => format!("state {word}"),
        _ if word.parse::<std::net::IpAddr>().is_ok() => format!("src {word} or dst {word}"),
        _ if word.trim_start_matches(':').parse::<u16>().is_ok() => {
            let port = word.trim_start_matches(':');
            format!("sport = :{port} or dport = :{port}")
        }
        _ => CONDITIONS.to_owned(),
    };
    Fault::new(span, message, example)
}

fn port(input: &mut Input<'_>, end: End, keyword: &str) -> ParseResult<Expression> {
    let example = format!("{keyword} = :8080 or {keyword} >= :1024");
    let (comparison, _) = comparison(input);
    let (text, span) = value(input, "a port", &example)?;
    let number = text.strip_prefix(':').unwrap_or(text);
    if number == "*" {
        return match comparison {
            Comparison::Equal => Ok(Expression::TRUE),
            Comparison::NotEqual => Ok(Expression::FALSE),
            _ => Err(Fault::new(
                span,
                "`*` stands for every port and cannot be compared",
                example,
            )),
        };
    }
    let port = port_number(input.state.services, number, span, &example)?;
    let range = |range| Expression::Port(end, range);
    Ok(match comparison {
        Comparison::Equal => range(port..=port),
        Comparison::NotEqual => range(port..=port).negated(),
        Comparison::LessOrEqual => range(0..=port),
        Comparison::GreaterOrEqual => range(port..=u16::MAX),
        Comparison::Less => port
            .checked_sub(1)
            .map_or(Expression::FALSE, |last| range(0..=last)),
        Comparison::Greater => port
            .checked_add(1)
            .map_or(Expression::FALSE, |first| range(first..=u16::MAX)),
    })
}

fn interface(input: &mut Input<'_>) -> ParseResult<Expression> {
    let example = "dev = eth0";
    let unequal = unequal(input, "dev", example)?;
    let (name, span) = value(input, "an interface", example)?;
    // IFNAMSIZ without the NUL.
    if name.len() > 15 {
        let message = format!("{} is longer than the name of an interface", quoted(name));
        return Err(Fault::new(span, message, example));
    }
    let tree = Expression::Interface(Interface::Named(name.to_owned()));
    Ok(match unequal {
        true => tree.negated(),
        false => tree,
    })
}

fn cgroup(input: &mut Input<'_>) -> ParseResult<Expression> {
    let example = "cgroup = /system.slice/nginx.service";
    let unequal = unequal(input, "cgroup", example)?;
    let (path, _) = value(input, "a cgroup", example)?;
    let tree = Expression::Cgroup(Cgroup2::Path(path.to_owned()));
    Ok(match unequal {
        true => tree.negated(),
        false => tree,
    })
}

fn is_states(lexeme: &Lexeme<'_>) -> bool {
    matches!(lexeme.token, Token::Word("state" | "exclude" | "excl"))
}

/// Parses a sequence of `state` and `exclude`. Each `state` adds to the set, and each `exclude` removes from it. If the sequence
/// begins with `exclude`, the set begins with all states.
fn states(input: &mut Input<'_>) -> ParseResult<Subtree> {
    let example = "state close-wait, or exclude listening";
    let mut set: Option<StateSet> = None;
    while let Some(keyword) = peek(input).filter(is_states) {
        next(input);
        let (name, span) = value(input, "a state", example)?;
        let named = state_names(name).ok_or_else(|| {
            let message = format!("{} is not a state", quoted(name));
            let example = "state close-wait, or one of established, syn-sent, syn-recv, fin-wait-1, \
                           fin-wait-2, time-wait, closed, last-ack, listening, closing, all, connected, \
                           synchronized, bucket, big";
            Fault::new(span, message, example)
        })?;
        set = Some(match keyword.text {
            "state" => set.unwrap_or(StateSet::EMPTY).union(named),
            _ => set.unwrap_or(StateSet::ALL).without(named),
        });
    }
    Ok(Subtree::leaf(Expression::State(set.unwrap_or_default())))
}

/// The states with this name: a state or several states, in any case.
fn state_names(name: &str) -> Option<StateSet> {
    use TcpState::{Close, Listen, SynRecv, SynSent, TimeWait};
    let bucket = StateSet::from_iter([SynRecv, TimeWait]);
    let unconnected = StateSet::from_iter([Close, Listen]);
    Some(match name.to_ascii_lowercase().as_str() {
        "all" => StateSet::ALL,
        "connected" => StateSet::ALL.without(unconnected),
        "synchronized" => StateSet::ALL.without(unconnected.union(SynSent.into())),
        "bucket" => bucket,
        "big" => StateSet::ALL.without(bucket),
        name => name.parse::<TcpState>().ok()?.into(),
    })
}

#[cfg(test)]
#[path = "parse_tests.rs"]
mod tests;
