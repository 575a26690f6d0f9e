//! The ranges of the monitoring plugin guidelines, and whether a value that is known only in part is in one. Pure.

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;

/// What a threshold is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// The number of stuck sockets.
    Sockets,
    /// The percentage of an owner's RLIMIT_NOFILE.
    PercentOfLimit,
}

/// A range. It alerts on a value outside, or with `@` on a value inside. Its ends belong to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Threshold {
    /// No value is below 0, so `~` is 0.
    start: u64,
    /// `None`: no upper limit.
    end: Option<u64>,
    alerts_inside: bool,
    pub unit: Unit,
}

/// A value as a fraction.
#[derive(Clone, Copy, Debug)]
pub struct Fraction {
    pub part: u64,
    /// Not 0.
    pub whole: u64,
}

impl Fraction {
    /// A number of sockets.
    pub fn number(number: u64) -> Self {
        Fraction {
            part: number,
            whole: 1,
        }
    }

    /// Compares with `limit`, or with `limit` percent. Exact: both sides are multiplied, not divided.
    fn compare(self, limit: u64, unit: Unit) -> Ordering {
        let scale = match unit {
            Unit::Sockets => 1,
            Unit::PercentOfLimit => 100,
        };
        (u128::from(self.part) * scale).cmp(&(u128::from(limit) * u128::from(self.whole)))
    }
}

impl Ord for Fraction {
    /// Exact: the quotients are compared by cross-multiplication.
    fn cmp(&self, other: &Self) -> Ordering {
        let product = |a: u64, b: u64| u128::from(a) * u128::from(b);
        product(self.part, other.whole).cmp(&product(other.part, self.whole))
    }
}

impl PartialOrd for Fraction {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Fraction {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Fraction {}

/// The values that a measure may have. Something that cwkill could not see makes the upper limit greater than the lower.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measure {
    pub at_least: Fraction,
    /// `None`: no limit.
    pub at_most: Option<Fraction>,
}

/// Whether a threshold alerts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alert {
    No,
    /// On some of the values that the measure may have.
    Possible,
    Yes,
}

impl Threshold {
    /// Whether it alerts on a measure.
    pub fn alert(&self, measure: Measure) -> Alert {
        let below = |value: Fraction| value.compare(self.start, self.unit).is_lt();
        let above = |value: Fraction| {
            self.end
                .is_some_and(|end| value.compare(end, self.unit).is_gt())
        };
        let Measure { at_least, at_most } = measure;
        let is_inside = !below(at_least) && at_most.map_or(self.end.is_none(), |it| !above(it));
        let is_outside = above(at_least) || at_most.is_some_and(below);
        match (is_inside, is_outside) {
            (true, _) if self.alerts_inside => Alert::Yes,
            (_, true) if !self.alerts_inside => Alert::Yes,
            (false, false) => Alert::Possible,
            _ => Alert::No,
        }
    }

    /// N of a threshold `N`, `0:N` or `~:N`: it alerts on more than N and on nothing else.
    pub fn upper_limit(&self) -> Option<u64> {
        self.end.filter(|_| self.start == 0 && !self.alerts_inside)
    }

    /// The same, as a percentage.
    pub fn of_limit(self) -> Self {
        Threshold {
            unit: Unit::PercentOfLimit,
            ..self
        }
    }
}

/// As the guidelines write it, without a percent sign: the value of the performance data has one.
impl fmt::Display for Threshold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = if self.alerts_inside { "@" } else { "" };
        match (self.start, self.end) {
            (0, Some(end)) => write!(f, "{at}{end}"),
            (start, Some(end)) => write!(f, "{at}{start}:{end}"),
            (start, None) => write!(f, "{at}{start}:"),
        }
    }
}

const EXAMPLES: &str = "for example 100 (more than 100), 10:20 (outside 10 to 20), @10:20 (inside), or 80% of an owner's limit of open files";

impl FromStr for Threshold {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // A shell replaces a ~ without quotes by a directory.
        let shell = match text.strip_prefix('@').unwrap_or(text).starts_with('/') {
            true => " (if it began with ~, the shell has replaced that: put it in quotes)",
            false => "",
        };
        let bad = || format!("`{text}` is not a threshold{shell}; {EXAMPLES}");
        let (alerts_inside, range) = match text.strip_prefix('@') {
            Some(range) => (true, range),
            None => (false, text),
        };
        let (start, end) = range.split_once(':').unwrap_or(("", range));
        if start.is_empty() && end.is_empty() {
            return Err(bad());
        }
        let number = |text: &str| -> Result<(u64, bool), String> {
            let percent = text.strip_suffix('%');
            let digits = percent.unwrap_or(text);
            // Rust would allow a plus sign.
            let is_plain = digits.bytes().all(|byte| byte.is_ascii_digit());
            let number = digits.parse().ok().filter(|_| is_plain);
            Ok((number.ok_or_else(bad)?, percent.is_some()))
        };
        // 0 is the same with and without a percent sign, and so is no limit.
        let unit =
            |limit: Option<(u64, bool)>| limit.filter(|(number, percent)| *number > 0 || *percent);
        let first = match start {
            "" | "~" => None,
            // No value is below 0.
            _ if is_negative(start) => None,
            _ => Some(number(start)?),
        };
        let last = match end {
            "" => None,
            _ if is_negative(end) => {
                return Err(format!(
                    "`{text}` ends below 0, and no value is; {EXAMPLES}"
                ));
            }
            _ => Some(number(end)?),
        };
        let unit = match (unit(first), unit(last)) {
            (Some((_, a)), Some((_, b))) if a != b => {
                return Err(format!(
                    "`{text}` is a percentage at one end only; for example 10%:20%"
                ));
            }
            (Some((_, true)), _) | (_, Some((_, true))) => Unit::PercentOfLimit,
            _ => Unit::Sockets,
        };
        let start = first.map_or(0, |(number, _)| number);
        let end = last.map(|(number, _)| number);
        if let Some(end) = end
            && start > end
        {
            let percent = match unit {
                Unit::Sockets => "",
                Unit::PercentOfLimit => "%",
            };
            return Err(format!(
                "`{text}` ends before it begins; for example {end}{percent}:{start}{percent}"
            ));
        }
        Ok(Threshold {
            start,
            end,
            alerts_inside,
            unit,
        })
    }
}

/// Whether the text is a number below 0.
fn is_negative(text: &str) -> bool {
    let digits = text.strip_prefix('-').map(|it| it.trim_end_matches('%'));
    digits.is_some_and(|digits| digits.parse::<u64>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn threshold(text: &str) -> Threshold {
        text.parse().unwrap_or_else(|error| panic!("{error}"))
    }

    fn known(fraction: Fraction) -> Measure {
        Measure {
            at_least: fraction,
            at_most: Some(fraction),
        }
    }

    #[test]
    fn the_ends_of_a_range_belong_to_it() {
        for (text, alerts, quiet) in [
            ("10", &[11, 1000][..], &[0, 10][..]),
            ("0", &[1], &[0]),
            ("0:10", &[11], &[0, 10]),
            (":10", &[11], &[0, 10]),
            ("~:10", &[11], &[0, 10]),
            ("-5:10", &[11], &[0, 10]),
            ("10:", &[0, 9], &[10, 1000]),
            ("10:20", &[0, 9, 21], &[10, 15, 20]),
            ("10:10", &[9, 11], &[10]),
            ("@10:20", &[10, 15, 20], &[0, 9, 21]),
            ("@10", &[0, 10], &[11]),
            ("@~:10", &[0, 10], &[11]),
            ("@10:", &[10, 1000], &[0, 9]),
            ("~:", &[], &[0, 1000]),
            ("0:", &[], &[0, 1000]),
        ] {
            let alert = |number: &u64| threshold(text).alert(known(Fraction::number(*number)));
            assert!(alerts.iter().all(|it| alert(it) == Alert::Yes), "{text}");
            assert!(quiet.iter().all(|it| alert(it) == Alert::No), "{text}");
        }
    }

    #[test]
    fn a_percentage_is_compared_exactly() {
        let of = |part, whole| known(Fraction { part, whole });
        let alert = |text, measure| threshold(text).alert(measure) == Alert::Yes;
        assert!(!alert("20%", of(10, 50)));
        assert!(alert("20%", of(11, 50)));
        // 20.0000…1 percent.
        assert!(alert("20%", of(u64::MAX / 5 + 1, u64::MAX)));
        assert!(!alert("20%", of(u64::MAX / 5, u64::MAX)));
        assert!(alert("10%:", of(4, 50)) && !alert("10%:", of(5, 50)));
        assert!(alert("@10%:20%", of(10, 50)) && !alert("@10%:20%", of(11, 50)));
        assert!(alert("0%", of(1, u64::MAX)) && !alert("0%", of(0, 1)));
    }

    #[test]
    fn an_unknown_part_makes_an_alert_possible_only_if_it_could() {
        let alert = |text, low, high: Option<u64>| {
            threshold(text).alert(Measure {
                at_least: Fraction::number(low),
                at_most: high.map(Fraction::number),
            })
        };
        use Alert::{No, Possible, Yes};
        for (text, low, high, expected) in [
            ("10", 5, Some(10), No),
            ("10", 5, Some(11), Possible),
            ("10", 5, None, Possible),
            ("10", 11, None, Yes),
            ("10:", 9, None, Possible),
            ("10:", 10, None, No),
            ("10:", 5, Some(9), Yes),
            ("10:20", 5, Some(30), Possible),
            ("@10:20", 5, Some(30), Possible),
            ("@10:20", 10, Some(20), Yes),
            ("@10:20", 10, None, Possible),
            ("@10:20", 21, None, No),
            ("@10:", 10, None, Yes),
            ("~:", 0, None, No),
        ] {
            assert_eq!(alert(text, low, high), expected, "{text} {low} {high:?}");
        }
    }

    #[test]
    fn a_range_is_shown_as_the_guidelines_write_it() {
        for (text, shown) in [
            ("10", "10"),
            ("0:10", "10"),
            ("~:5", "5"),
            ("10:20", "10:20"),
            ("@10:20", "@10:20"),
            ("@5", "@5"),
            ("10:", "10:"),
            ("~:", "0:"),
            ("50%", "50"),
            ("10%:20%", "10:20"),
            ("0:20%", "20"),
            ("@10%:", "@10:"),
        ] {
            assert_eq!(threshold(text).to_string(), shown, "{text}");
        }
    }

    #[test]
    fn bad_ranges_are_named_with_a_good_one() {
        for (text, good) in [
            ("", "10:20"),
            (":", "10:20"),
            ("@", "10:20"),
            ("@:", "10:20"),
            ("~", "10:20"),
            ("many", "10:20"),
            ("5x", "10:20"),
            ("/root:2", "put it in quotes"),
            ("1:2:3", "10:20"),
            ("%", "10:20"),
            ("-5", "10:20"),
            ("+5", "10:20"),
            ("1.5", "10:20"),
            ("5:~", "10:20"),
            ("20:10", "10:20"),
            ("20%:10%", "10%:20%"),
            ("10%:20", "10%:20%"),
            ("99999999999999999999", "10:20"),
        ] {
            let error = text.parse::<Threshold>().unwrap_err();
            assert!(error.contains(good), "{text}: {error}");
            assert!(error.contains(&format!("`{text}`")), "{text}: {error}");
        }
    }
}
