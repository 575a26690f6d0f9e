//! Tests of the grammar: what it takes, and what it says of what it does not.

use super::*;
use proptest::prelude::*;

fn services() -> Services {
    Services::from_text("ssh 22/tcp\nhttp 80/tcp www\n")
}

fn tree(text: &str) -> Expression {
    parse(text, &services())
        .unwrap_or_else(|error| panic!("{text}: {error}"))
        .expression
}

fn error(text: &str) -> SyntaxError {
    parse(text, &services()).expect_err(text)
}

fn local(port: u16) -> Expression {
    Expression::Port(End::Local, port..=port)
}

fn all(parts: impl Into<Vec<Expression>>) -> Expression {
    Expression::All(parts.into())
}

fn any(parts: impl Into<Vec<Expression>>) -> Expression {
    Expression::Any(parts.into())
}

#[test]
fn every_spelling_of_a_comparison() {
    let not = |tree: Expression| tree.negated();
    let range = |range| Expression::Port(End::Local, range);
    for (operators, expected) in [
        ("= == eq", range(80..=80)),
        ("!= ne neq", not(range(80..=80))),
        ("< lt", range(0..=79)),
        ("<= le leq", range(0..=80)),
        ("> gt", range(81..=65_535)),
        (">= ge geq", range(80..=65_535)),
    ] {
        for operator in operators.split(' ') {
            for port in ["80", ":80", "http", ":www"] {
                let text = format!("sport {operator} {port}");
                assert_eq!(tree(&text), expected, "{text}");
            }
        }
    }
    for text in [
        "sport 80",
        "sport :80",
        "sport http",
        "sport=:80",
        "sport==80",
    ] {
        assert_eq!(tree(text), local(80), "{text}");
    }
    assert_eq!(tree("dport 80"), Expression::Port(End::Peer, 80..=80));
    assert_eq!(tree("sport>=:80"), range(80..=65_535));
}

#[test]
fn hosts() {
    let address = |text: &str| Expression::Address(End::Local, text.parse().unwrap());
    for (text, expected) in [
        ("src 10.0.0.1", address("10.0.0.1/32")),
        ("src = 10.0.0.1", address("10.0.0.1/32")),
        ("src == 10.0.0.1", address("10.0.0.1/32")),
        ("src eq 10.0.0.1", address("10.0.0.1/32")),
        ("src != 10.0.0.1", address("10.0.0.1/32").negated()),
        ("src 10.1.2.3/8", address("10.0.0.0/8")),
        ("src 193.233.7/24", address("193.233.7.0/24")),
        ("src 10/8", address("10.0.0.0/8")),
        ("src 10.0.0.0/255.0.0.0", address("10.0.0.0/8")),
        ("src 10.0.0.1:80", all([address("10.0.0.1/32"), local(80)])),
        (
            "src 10.0.0.0/8:http",
            all([address("10.0.0.0/8"), local(80)]),
        ),
        ("src 10.0.0.0/8:*", address("10.0.0.0/8")),
        ("src :80", local(80)),
        ("src *:80", local(80)),
        ("src *", Expression::TRUE),
        ("src any", Expression::TRUE),
        ("src *:*", Expression::TRUE),
        ("src [fd00::1]", address("fd00::1/128")),
        ("src [fd00::/8]", address("fd00::/8")),
        ("src [fd00::1]:80", all([address("fd00::1/128"), local(80)])),
        ("src [fd00::/8]:80", all([address("fd00::/8"), local(80)])),
        ("src fd00::/8", address("fd00::/8")),
        ("src fd00::/8:80", all([address("fd00::/8"), local(80)])),
        (
            "src [10.0.0.1]:80",
            all([address("10.0.0.1/32"), local(80)]),
        ),
        ("src [::ffff:10.0.0.1]", address("::ffff:10.0.0.1/128")),
        (
            "src != 10.0.0.1:80",
            all([address("10.0.0.1/32"), local(80)]).negated(),
        ),
    ] {
        assert_eq!(tree(text), expected, "{text}");
    }
}

#[test]
fn every_spelling_of_an_operator() {
    let (a, b) = (local(22), local(80));
    for and in ["and", "&", "&&", ""] {
        let text = format!("sport 22 {and} sport 80");
        assert_eq!(tree(&text), all([a.clone(), b.clone()]), "{text}");
    }
    for or in ["or", "|", "||"] {
        let text = format!("sport 22 {or} sport 80");
        assert_eq!(tree(&text), any([a.clone(), b.clone()]), "{text}");
    }
    for not in ["not", "!", "! ! !", "not ! not"] {
        let text = format!("{not} sport 22");
        assert_eq!(tree(&text), a.clone().negated(), "{text}");
    }
    // Any white space parts words, and none of it ends the expression.
    for space in [" ", "\t", "\n", "\u{b}", "\u{a0}", "\u{2003}"] {
        let text = format!("sport{space}22{space}sport 80{space}");
        assert_eq!(tree(&text), all([a.clone(), b.clone()]), "{text:?}");
    }
    for same in [
        "(sport 22)",
        "((sport=:22))",
        "!!sport 22",
        "not not sport 22",
    ] {
        assert_eq!(tree(same), a, "{same}");
    }
    assert_eq!(
        tree("!(sport=22||sport=80)&&sport!=22"),
        all([any([a.clone(), b.clone()]).negated(), a.clone().negated()])
    );
}

#[test]
fn from_left_to_right_as_in_ss() {
    let (a, b, c) = (local(1), local(2), local(3));
    let parsed = |text| parse(text, &services()).expect(text);
    let mixed = parsed("sport 1 or sport 2 and sport 3");
    assert_eq!(
        mixed.expression,
        all([any([a.clone(), b.clone()]), c.clone()])
    );
    assert!(mixed.doubt.unwrap().contains("column 20"));
    let juxtaposed = parsed("sport 1 or sport 2 sport 3");
    assert_eq!(juxtaposed.expression, mixed.expression);
    assert!(juxtaposed.doubt.is_some());
    // Here ss does what its manual says.
    for text in [
        "sport 1 and sport 2 or sport 3",
        "(sport 1 or sport 2) and sport 3",
        "sport 1 or (sport 2 and sport 3)",
        "state close-wait sport 1 or sport 2",
        "sport 1 or sport 2 or sport 3",
    ] {
        assert_eq!(parsed(text).doubt, None, "{text}");
    }
    assert_eq!(
        tree("sport 1 and sport 2 or sport 3"),
        any([all([a, b]), c])
    );
}

#[test]
fn states_at_the_head_hold_for_all_of_the_list() {
    use TcpState::{CloseWait, LastAck};
    let states = |states: &[TcpState]| Expression::State(states.iter().copied().collect());
    let (a, b) = (local(1), local(2));
    let ports = any([a.clone(), b.clone()]);
    let close_wait = states(&[CloseWait]);
    for text in [
        "state close-wait sport 1 or sport 2",
        "state CLOSE-WAIT and sport 1 or sport 2",
        "state close_wait (sport 1 or sport 2)",
        "( state close-wait sport 1 or sport 2 )",
    ] {
        assert_eq!(
            tree(text),
            all([close_wait.clone(), ports.clone()]),
            "{text}"
        );
    }
    assert_eq!(
        tree("sport 1 or sport 2 state close-wait"),
        all([ports, close_wait.clone()])
    );
    assert_eq!(
        tree("state close-wait or sport 1"),
        any([close_wait.clone(), a])
    );
    assert_eq!(
        tree("state close-wait state last-ack"),
        states(&[CloseWait, LastAck])
    );
    assert_eq!(tree("state close-wait exclude close-wait"), states(&[]));
    assert_eq!(tree("not state close-wait"), close_wait.negated());
}

#[test]
fn groups_of_states_are_those_of_ss() {
    let set = |text: &str| match tree(text) {
        Expression::State(states) => states,
        other => panic!("{text}: {other:?}"),
    };
    let names = |text: &str| set(text).mask();
    let mask = |numbers: &[u32]| numbers.iter().fold(0, |mask, n| mask | 1 << n);
    assert_eq!(
        names("state all"),
        mask(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])
    );
    assert_eq!(
        names("state connected"),
        mask(&[1, 2, 3, 4, 5, 6, 8, 9, 11])
    );
    assert_eq!(
        names("state synchronized"),
        mask(&[1, 3, 4, 5, 6, 8, 9, 11])
    );
    assert_eq!(names("state bucket"), mask(&[3, 6]));
    assert_eq!(names("state big"), mask(&[1, 2, 4, 5, 7, 8, 9, 10, 11]));
    assert_eq!(names("exclude listening"), names("exclude listen"));
    assert_eq!(set("exclude big"), set("state bucket"));
    assert_eq!(set("excl big exclude time-wait"), set("state syn-rcv"));
}

#[test]
fn errors_say_where_and_show_a_good_one() {
    for (text, column, part) in [
        ("sport", 6, "sport = :8080"),
        ("sport =", 8, "sport = :8080"),
        ("sport = and", 9, "before `and`"),
        ("sport = :8O8O", 9, "8O8O"),
        ("sport = :65536", 9, "65535"),
        ("sport = :080", 9, "zero"),
        ("sport = :", 9, "missing"),
        ("sport > *", 9, "every port"),
        ("sport = 80 80", 12, "sport = :80"),
        ("dport = :80 ,", 13, "does not begin a condition"),
        ("SPORT = :80", 1, "lower case"),
        ("close-wait", 1, "state close-wait"),
        (":80", 1, "dport = :80"),
        ("10.0.0.1", 1, "dst 10.0.0.1"),
        ("src localhost", 5, "not resolved"),
        ("src 80", 5, ":80"),
        ("src 10.1", 5, "10.1/16"),
        ("src 10.0.0.0/33", 5, "not a prefix length"),
        ("src 10.0.0.0/x:1", 5, "not a prefix length"),
        ("src 10.0.0.1:x", 14, "neither a port"),
        ("src fd00::1", 5, "[fd00::1]"),
        ("src [fd00::1", 5, "never closed"),
        ("src [fd00::1]80", 5, ":PORT"),
        ("src []:80", 5, "empty"),
        ("src [fd00::/129]", 5, "not a prefix length"),
        ("src > 10.0.0.1", 5, "no order"),
        ("dev < eth0", 5, "no order"),
        ("dev", 4, "interface"),
        ("dev = an-interface-of-20", 7, "longer"),
        ("( sport 80", 1, "never closed"),
        ("sport 80 )", 10, "closes nothing"),
        ("()", 2, "before `)`"),
        ("", 1, "missing at the end"),
        ("   ", 4, "missing at the end"),
        ("sport 80 and", 13, "missing at the end"),
        ("sport 80 and and sport 80", 14, "before `and`"),
        ("sport 80 or", 12, "missing at the end"),
        ("or sport 80", 1, "before `or`"),
        ("not", 4, "missing at the end"),
        ("state", 6, "a state"),
        ("state stuck", 7, "established"),
        ("state (close-wait)", 7, "before `(`"),
        ("fwmark = 1", 1, "not supported"),
        ("cgroup > /x", 8, "no order"),
        ("cgroup =", 9, "a cgroup"),
        ("sport = :80 and ünd", 17, "does not begin a condition"),
    ] {
        let error = error(text);
        assert_eq!(error.column(), column, "{text}: {error}");
        let shown = error.to_string();
        assert!(shown.contains(part), "{text}: {shown}");
        assert!(shown.contains("for example: "), "{text}: {shown}");
        let lines: Vec<&str> = shown.lines().collect();
        assert_eq!(lines[2].find('^'), Some(4 + column - 1), "{text}: {shown}");
    }
}

#[test]
fn long_and_deep_expressions() {
    let parens = |count| format!("{}sport 80{}", "(".repeat(count), ")".repeat(count));
    assert_eq!(tree(&parens(MAX_DEPTH)), local(80));
    for text in [
        parens(MAX_DEPTH + 1),
        parens(10_000),
        "(".repeat(65_536),
        "!(".repeat(32_768),
        "( not ".repeat(10_000),
    ] {
        assert!(
            error(&text).to_string().contains("deeper"),
            "{}",
            text.len()
        );
    }
    assert_eq!(tree(&format!("{}sport 80", "!".repeat(65_536))), local(80));
    assert_eq!(
        error(&")".repeat(10_000)).column(),
        1,
        "closing parentheses alone"
    );

    let flat = ["sport 80"; 7_000].join(" or ");
    assert!(matches!(tree(&flat), Expression::Any(parts) if parts.len() == 7_000));
    let mixed = ["sport 80 or sport 80"; 3_000].join(" and ");
    assert!(error(&mixed).to_string().contains("deeper"));
    for text in [
        "x".repeat(65_536),
        "sport ".repeat(11_000),
        format!("sport = {}", "8".repeat(65_536)),
        format!("src {}", "f".repeat(65_536)),
        format!("src 10/{}", "8".repeat(65_536)),
        format!("state {}", "s".repeat(65_536)),
    ] {
        assert!(error(&text).to_string().len() < 1_000);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn no_text_is_too_strange(text in ".{0,200}") {
        if let Err(error) = parse(&text, &services()) {
            prop_assert!(error.column() <= text.chars().count() + 1);
            prop_assert!(!error.to_string().is_empty());
        }
    }

    #[test]
    fn nor_any_order_of_known_words(words in prop::collection::vec(
        prop::sample::select(vec![
            "sport", "dport", "src", "dst", "dev", "state", "exclude", "autobound", "and", "or", "not",
            "!", "&", "|", "(", ")", "=", "!=", "<", ">=", "eq", ":80", "80", "*", "http", "10/8", "[::1]:80",
            "[", "]", "/", ":", "close-wait", "all", "eth0", "cgroup",
        ]), 0..12)) {
        let text = words.join(" ");
        if let Err(error) = parse(&text, &services()) {
            prop_assert!(error.to_string().contains("for example: "), "{}", error);
            prop_assert!(error.to_string().lines().count() == 4);
        }
    }
}
