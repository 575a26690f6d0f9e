//! Text for people: names that are safe to print, counts, ages, rates and durations.

use std::time::Duration;

use unicode_width::UnicodeWidthStr;

/// Escapes control characters, and characters that reorder or hide text.
///
/// A process chooses its own name. The name can contain characters that move the cursor of the operator or forge a line.
pub fn escape(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    for c in name.chars() {
        if is_unsafe(c) || c == '\u{fffd}' {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// Escapes a text of several lines, each as [`escape`] does.
pub fn escape_lines(text: &str) -> String {
    let lines: Vec<String> = text.split('\n').map(escape).collect();
    lines.join("\n")
}

/// Whether a character may move the cursor, or hide or reorder text.
pub fn is_unsafe(c: char) -> bool {
    c.is_control() || is_invisible(c)
}

/// Format characters: they take no column, and can reorder their neighbours (Unicode UAX #9).
fn is_invisible(c: char) -> bool {
    matches!(
        c,
        '\u{ad}'
            | '\u{61c}'
            | '\u{180e}'
            | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e007f}'
    )
}

/// A duration in its two largest units, for example `1h02m`.
pub fn age(age: Duration) -> String {
    let seconds = age.as_secs();
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) if seconds == 0 => format!("{}ms", age.as_millis()),
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m{:02}s", seconds % 60),
        (0, _, _) => format!("{hours}h{minutes:02}m"),
        _ => format!("{days}d{hours:02}h"),
    }
}

/// A number with its noun: `1 process`, `2 processes`.
pub fn counted(count: usize, noun: &str) -> String {
    let ending = match (count, noun.ends_with('s')) {
        (1, _) => "",
        (_, true) => "es",
        (_, false) => "s",
    };
    format!("{count} {noun}{ending}")
}

/// So many processes, by their `names` if these are known of all: `sshd/812 and cron/4`, or `12 processes`.
pub fn named_or_counted(count: usize, names: &[String]) -> String {
    match names.split_last() {
        Some((last, [])) if count == 1 => last.clone(),
        Some((last, others)) if count == names.len() => {
            format!("{} and {last}", others.join(", "))
        }
        _ => counted(count, "process"),
    }
}

/// Converts a count over `time` to a rate per minute; 0 if `time` is zero.
pub fn per_minute(count: usize, time: Duration) -> f64 {
    match time.is_zero() {
        true => 0.0,
        false => f64::from(u32::try_from(count).unwrap_or(u32::MAX)) * 60.0 / time.as_secs_f64(),
    }
}

/// A rate with one decimal below ten, so that a slow leak is not printed as 0.
pub fn format_rate(per_minute: f64) -> String {
    let text = match per_minute.abs() < 10.0 {
        true => format!("{per_minute:.1}"),
        false => format!("{per_minute:.0}"),
    };
    match text.as_str() {
        "0.0" | "-0.0" => "0".into(),
        _ => text,
    }
}

/// A measured time: whole seconds, or milliseconds below one second.
pub fn seconds(time: Duration) -> String {
    match time.as_secs() {
        0 => format!("{} ms", time.as_millis()),
        _ => format!("{:.0} s", time.as_secs_f64()),
    }
}

/// The words as one line, quoted for a shell.
pub fn shell_line<S: AsRef<str>>(words: &[S]) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_@%+=:,./-".contains(c);
    let quoted = |word: &S| match word.as_ref() {
        word if !word.is_empty() && word.chars().all(plain) => word.to_owned(),
        word => format!("'{}'", word.replace('\'', r"'\''")),
    };
    words.iter().map(quoted).collect::<Vec<_>>().join(" ")
}

/// The number of columns that `text` takes on a terminal.
pub fn columns_of(text: &str) -> usize {
    UnicodeWidthStr::width(text)
}

/// The rows of a line on a terminal with so many columns, if it is one; see [`wrap`].
pub fn broken(line: &str, columns: Option<usize>) -> Vec<String> {
    /// The spaces before all rows but the first.
    const INDENT: usize = 2;
    match columns {
        Some(columns) => wrap(line, columns, INDENT),
        None => vec![line.to_owned()],
    }
}

/// Breaks a line between words, so that no row takes more than `columns`, except one that is a single longer word. All rows but the
/// first begin with `indent` spaces, if there is room for these and a word. A command between backquotes stays on one row if it fits
/// there, so that it can be copied.
pub fn wrap(line: &str, columns: usize, indent: usize) -> Vec<String> {
    let indent = if indent * 2 < columns { indent } else { 0 };
    let (mut rows, mut row) = (Vec::new(), String::new());
    let (mut width, mut is_empty) = (0, true);
    for word in unbroken(line, columns - indent) {
        let wide = columns_of(word);
        if !is_empty && width + 1 + wide > columns {
            rows.push(std::mem::replace(&mut row, " ".repeat(indent)));
            (width, is_empty) = (indent, true);
        }
        if !is_empty {
            row.push(' ');
            width += 1;
        }
        row.push_str(word);
        width += wide;
        is_empty = false;
    }
    rows.push(row);
    rows
}

/// Breaks a line with sequences for colours where `rows` are broken, which [`broken`] has made of the same line without them.
pub fn broken_alike(styled: &str, rows: &[String]) -> Vec<String> {
    let mut words = styled.split(' ');
    let row = |row: &String| {
        let text = row.trim_start_matches(' ');
        let indent = &row[..row.len() - text.len()];
        let words: Vec<&str> = words.by_ref().take(text.split(' ').count()).collect();
        format!("{indent}{}", words.join(" "))
    };
    match rows {
        [] | [_] => vec![styled.to_owned()],
        rows => rows.iter().map(row).collect(),
    }
}

/// The words of a line, and its commands between backquotes, as far as these fit into `columns`.
fn unbroken(line: &str, columns: usize) -> impl Iterator<Item = &str> {
    let mut rest = Some(line);
    std::iter::from_fn(move || {
        let text = rest?;
        let space = |from: usize| text[from..].find(' ').map(|at| from + at);
        let word_end = space(0);
        let command = text[..word_end.unwrap_or(text.len())].find('`');
        let close = command.and_then(|open| Some(open + 1 + text[open + 1..].find('`')?));
        let command_end = close.map(space);
        let end = match command_end {
            Some(end) if columns_of(&text[..end.unwrap_or(text.len())]) <= columns => end,
            _ => word_end,
        };
        let (word, after) = match end {
            Some(end) => (&text[..end], Some(&text[end + 1..])),
            None => (text, None),
        };
        rest = after;
        Some(word)
    })
}

/// A name, escaped, and cut if it takes more than `columns`; then it ends with two dots. An escape is never cut in two. With `ascii`,
/// every other character is escaped too, for a terminal without UTF-8.
pub fn short_name(name: &str, columns: usize, ascii: bool) -> String {
    const CUT: &str = "..";
    let escaped = |c: char| match ascii && !c.is_ascii() {
        true => c.escape_default().to_string(),
        false => escape(c.encode_utf8(&mut [0; 4])),
    };
    let whole: String = name.chars().map(escaped).collect();
    if columns_of(&whole) <= columns {
        return whole;
    }
    let room = columns.saturating_sub(CUT.len());
    let mut short = String::new();
    for part in name.chars().map(escaped) {
        if columns_of(&short) + columns_of(&part) > room {
            break;
        }
        short.push_str(&part);
    }
    short + CUT
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_processes_are_named() {
        let names = ["sshd/812", "cron/4", "process 7"].map(str::to_owned);
        assert_eq!(named_or_counted(1, &names[..1]), "sshd/812");
        assert_eq!(named_or_counted(2, &names[..2]), "sshd/812 and cron/4");
        assert_eq!(
            named_or_counted(3, &names),
            "sshd/812, cron/4 and process 7"
        );
        assert_eq!(named_or_counted(12, &[]), "12 processes");
        assert_eq!(named_or_counted(1, &[]), "1 process");
        assert_eq!(named_or_counted(4, &names), "4 processes");
    }

    #[test]
    fn nothing_reaches_the_terminal_that_moves_it() {
        assert_eq!(escape("\x1b[2J"), "\\u{1b}[2J");
        assert_eq!(escape("a\nb\r\x07\u{9b}"), "a\\nb\\r\\u{7}\\u{9b}");
        assert_eq!(escape("\u{202e}gpj"), "\\u{202e}gpj");
        assert_eq!(escape("java é 名"), "java é 名");
        assert_eq!(escape_lines("a\x1bb\n\tc\n"), "a\\u{1b}b\n\\tc\n");
        // So a message of escaped parts can be escaped as a whole.
        assert_eq!(escape(&escape("a\nb\x1b")), escape("a\nb\x1b"));
    }

    #[test]
    fn a_coloured_line_is_broken_as_the_same_line_without_colours() {
        let plain = "error: there is no --force: to lose bytes use `--a b`";
        let styled =
            "\x1b[31merror:\x1b[0m there is no \x1b[1m--force\x1b[0m: to lose bytes use `--a b`";
        let rows = broken(plain, Some(24));
        assert_eq!(
            rows,
            [
                "error: there is no",
                "  --force: to lose bytes",
                "  use `--a b`"
            ]
        );
        assert_eq!(
            broken_alike(styled, &rows),
            [
                "\x1b[31merror:\x1b[0m there is no",
                "  \x1b[1m--force\x1b[0m: to lose bytes",
                "  use `--a b`"
            ]
        );
        assert_eq!(broken_alike(styled, &broken(plain, None)), [styled]);
        assert_eq!(broken_alike("", &broken("", Some(24))), [""]);
    }

    #[test]
    fn ages_show_two_units() {
        let text = |seconds| age(Duration::from_secs(seconds));
        assert_eq!(age(Duration::from_millis(7)), "7ms");
        assert_eq!(text(59), "59s");
        assert_eq!(text(60), "1m00s");
        assert_eq!(text(3_725), "1h02m");
        assert_eq!(text(90_000), "1d01h");
    }

    #[test]
    fn lines_break_between_words() {
        let line = "one two three";
        assert_eq!(wrap(line, 13, 2), ["one two three"]);
        assert_eq!(wrap(line, 12, 2), ["one two", "  three"]);
        assert_eq!(wrap(line, 7, 2), ["one two", "  three"]);
        assert_eq!(wrap(line, 6, 2), ["one", "  two", "  three"]);
        assert_eq!(wrap(line, 3, 2), ["one", "two", "three"]);
        assert_eq!(wrap(line, 0, 8), ["one", "two", "three"]);
        assert_eq!(wrap("", 10, 2), [""]);
        assert_eq!(
            wrap("run `ls -l`, then `a long command`", 20, 2),
            ["run `ls -l`, then", "  `a long command`"]
        );
        assert_eq!(
            wrap("run `a long command`", 12, 2),
            ["run `a long", "  command`"]
        );
        assert_eq!(wrap("one `two three", 9, 0), ["one `two", "three"]);
        assert_eq!(
            wrap("a-very-long-word b", 5, 2),
            ["a-very-long-word", "  b"]
        );
    }

    #[test]
    fn a_long_name_is_cut_between_characters() {
        assert_eq!(short_name("java", 4, false), "java");
        assert_eq!(short_name("javas", 4, false), "ja..");
        let evil = "\x1b\x1b\x1b\x1b";
        assert_eq!(short_name(evil, 24, false), "\\u{1b}\\u{1b}\\u{1b}\\u{1b}");
        assert_eq!(short_name(evil, 23, false), "\\u{1b}\\u{1b}\\u{1b}..");
        assert_eq!(short_name(evil, 1, false), "..");
        // These characters take two columns each.
        assert_eq!(short_name("名前名前", 6, false), "名前..");
        assert_eq!(short_name("é", 9, true), "\\u{e9}");
    }

    #[test]
    fn a_line_can_be_pasted_into_a_shell() {
        assert_eq!(shell_line(&["cwkill", "--port", "80"]), "cwkill --port 80");
        assert_eq!(
            shell_line(&["sport = :80", "it's", ""]),
            r"'sport = :80' 'it'\''s' ''"
        );
    }

    #[test]
    fn nouns_follow_their_number() {
        assert_eq!(counted(1, "process"), "1 process");
        assert_eq!(counted(2, "process"), "2 processes");
        assert_eq!(counted(0, "socket"), "0 sockets");
    }

    #[test]
    fn a_slow_leak_is_not_rounded_to_none() {
        for (per_minute, expected) in [
            (30.0, "30"),
            (12.6, "13"),
            (0.4, "0.4"),
            (-0.3, "-0.3"),
            (-0.01, "0"),
            (0.0, "0"),
        ] {
            assert_eq!(format_rate(per_minute), expected);
        }
    }
}
