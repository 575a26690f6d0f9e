//! Text for people: names that are safe to print, counts, ages, rates and durations.

use std::time::Duration;

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

#[cfg(test)]
mod tests {
    use super::*;

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
    fn ages_show_two_units() {
        let text = |seconds| age(Duration::from_secs(seconds));
        assert_eq!(age(Duration::from_millis(7)), "7ms");
        assert_eq!(text(59), "59s");
        assert_eq!(text(60), "1m00s");
        assert_eq!(text(3_725), "1h02m");
        assert_eq!(text(90_000), "1d01h");
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
