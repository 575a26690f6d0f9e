//! Reads the values of the fields. Each error gives the reason and a valid example.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use toml::Value;
use toml::value::Datetime;

use super::error::{ConfigError, Source};
use super::raw::Field;
use super::{Expiry, Level, Listen, Percent, Window};
use crate::cli::values;
use crate::text::escape;

const DAY: u64 = 24 * 60 * 60;

impl Source<'_> {
    /// Reads a field with `parse`; `None` if it is not given. The error of `parse` does not name the field.
    pub fn read<T>(
        &self,
        name: &str,
        field: &Field,
        parse: impl Fn(&Value) -> Result<T, String>,
    ) -> Result<Option<T>, ConfigError> {
        let Some(spanned) = field else {
            return Ok(None);
        };
        let read = parse(spanned.get_ref());
        read.map(Some)
            .map_err(|why| self.error(&spanned.span(), format!("`{name}`: {why}")))
    }

    /// Reads a field that is one value or an array of them.
    pub fn read_list<T>(
        &self,
        name: &str,
        field: &Field,
        parse: impl Fn(&Value) -> Result<T, String>,
    ) -> Result<Vec<T>, ConfigError> {
        let list = self.read(name, field, |value| {
            items(value).iter().map(&parse).collect()
        })?;
        Ok(list.unwrap_or_default())
    }
}

/// The values of an array, or the one value.
pub(super) fn items(value: &Value) -> &[Value] {
    match value {
        Value::Array(values) => values,
        one => std::slice::from_ref(one),
    }
}

/// A value as it is written, for a message.
pub(super) fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => format!("`{}`", escape(text)),
        Value::Integer(number) => format!("`{number}`"),
        Value::Float(number) => format!("`{number}`"),
        Value::Boolean(given) => format!("`{given}`"),
        Value::Datetime(time) => format!("`{time}`"),
        Value::Array(_) => "a list".to_owned(),
        Value::Table(_) => "a table".to_owned(),
    }
}

pub(super) fn text(value: &Value) -> Result<String, String> {
    match value {
        Value::String(text) if !text.trim().is_empty() => Ok(text.clone()),
        Value::String(_) => Err("must not be empty".to_owned()),
        other => Err(format!("{} is not a text in quotes", shown(other))),
    }
}

pub(super) fn flag(value: &Value) -> Result<bool, String> {
    match value {
        Value::Boolean(given) => Ok(*given),
        other => Err(format!(
            "{} must be true or false, without quotes",
            shown(other)
        )),
    }
}

/// A number of at least 1.
pub(super) fn count(value: &Value) -> Result<u32, String> {
    let number = match value {
        Value::Integer(number) => u32::try_from(*number).ok().filter(|number| *number > 0),
        _ => None,
    };
    number.ok_or_else(|| {
        format!(
            "{} is not a number of at least 1; for example 100",
            shown(value)
        )
    })
}

/// A duration as on the command line.
pub(super) fn duration(value: &Value) -> Result<Duration, String> {
    match value {
        Value::String(text) => values::duration(text),
        Value::Integer(number) => Err(format!(
            "`{number}` has no unit; for example \"{number}s\", \"15m\" or \"2h\""
        )),
        other => Err(format!(
            "{} is not a duration; for example \"90s\", \"15m\" or \"2h\"",
            shown(other)
        )),
    }
}

/// The time between two sweeps.
pub(super) fn interval(value: &Value) -> Result<Duration, String> {
    let range = Duration::from_secs(1)..=Duration::from_secs(DAY);
    match duration(value)? {
        interval if range.contains(&interval) => Ok(interval),
        _ => Err("must be between a second and a day; for example \"30s\"".to_owned()),
    }
}

pub(super) fn directory(value: &Value) -> Result<PathBuf, String> {
    let path = PathBuf::from(text(value)?);
    match path.is_absolute() {
        true => Ok(path),
        false => Err(format!(
            "{} must begin with /; for example \"/var/lib/prometheus/node-exporter\"",
            shown(value)
        )),
    }
}

/// The root directory of a host.
pub(super) fn host_root(value: &Value) -> Result<PathBuf, String> {
    let path = PathBuf::from(text(value)?);
    match path.is_absolute() {
        true => Ok(path),
        false => Err(format!(
            "{} must begin with /; for example \"/host\"",
            shown(value)
        )),
    }
}

pub(super) fn log_file(value: &Value) -> Result<PathBuf, String> {
    let path = PathBuf::from(text(value)?);
    match path.is_absolute() {
        true => Ok(path),
        false => Err(format!(
            "{} must begin with /; for example \"/var/log/cwkill/acts.jsonl\"",
            shown(value)
        )),
    }
}

pub(super) fn listen(value: &Value) -> Result<Listen, String> {
    let wrong = || {
        format!(
            "{} is not where to listen; for example \"127.0.0.1:9979\", \"[::1]:9979\", \"unix:/run/cwkill/metrics.sock\", \
             \"systemd\" (its socket) or \"none\"",
            shown(value)
        )
    };
    let text = text(value).map_err(|_| wrong())?;
    match text.as_str() {
        "none" => Ok(Listen::None),
        "systemd" => Ok(Listen::Systemd),
        _ => match text.strip_prefix("unix:") {
            Some(path) if path.starts_with('/') => Ok(Listen::Unix(path.into())),
            Some(_) => Err(wrong()),
            None => {
                let address: SocketAddr = text.parse().map_err(|_| wrong())?;
                match address.port() {
                    0 => Err(wrong()),
                    _ => Ok(Listen::Address(address)),
                }
            }
        },
    }
}

pub(super) fn port(value: &Value) -> Result<u16, String> {
    let port = match value {
        Value::Integer(number) => u16::try_from(*number).ok().filter(|port| *port > 0),
        _ => None,
    };
    port.ok_or_else(|| format!("{} is not a port; for example 22", shown(value)))
}

pub(super) fn user(value: &Value) -> Result<u32, String> {
    match value {
        Value::Integer(number) => values::user(&number.to_string()),
        other => values::user(&text(other)?),
    }
}

/// A percentage in quotes, over 0 and up to 100.
pub(super) fn percent(value: &Value) -> Result<Percent, String> {
    let number = match value {
        Value::String(text) => text.strip_suffix('%').and_then(|it| it.trim().parse().ok()),
        _ => None,
    };
    let percent = number.filter(|number| (1..=100).contains(number));
    percent.map(Percent).ok_or_else(|| {
        format!(
            "{} is not a percentage from 1 to 100; for example \"50%\"",
            shown(value)
        )
    })
}

/// A number of sockets, or a percentage of the owner's limit of open files.
pub(super) fn level(value: &Value) -> Result<Level, String> {
    let level = match value {
        Value::Integer(_) => count(value).ok().map(Level::Sockets),
        _ => percent(value).ok().map(Level::OfLimit),
    };
    level.ok_or_else(|| {
        format!(
            "{} is neither a number of sockets nor a percentage of the owner's limit of open files (RLIMIT_NOFILE); \
             for example 500 or \"50%\"",
            shown(value)
        )
    })
}

/// A name that can be a label, a file name and an argument.
pub(super) fn name(value: &Value) -> Result<String, String> {
    const LONGEST: usize = 63;
    let is_good = |text: &str| {
        text.len() <= LONGEST
            && text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
    };
    match value {
        Value::String(text) if is_good(text) => Ok(text.clone()),
        other => Err(format!(
            "{} is not a name: up to {LONGEST} letters, digits, - and _, and a letter or digit first; for example \"tomcat-leak\"",
            shown(other)
        )),
    }
}

/// The end of a day, or an instant with its offset to UTC.
pub(super) fn expiry(value: &Value) -> Result<Expiry, String> {
    let wrong = || {
        format!(
            "{} is not a date, or a time with its offset to UTC; for example 2027-01-31 or 2027-01-31T18:00:00Z",
            shown(value)
        )
    };
    let time = match value {
        Value::Datetime(time) => *time,
        Value::String(text) => text.parse::<Datetime>().map_err(|_| wrong())?,
        _ => return Err(wrong()),
    };
    let at = instant(&time).ok_or_else(wrong)?;
    Ok(Expiry {
        at,
        text: time.to_string(),
    })
}

/// When this time begins, or this date ends; `None` if it is neither, or before 1970.
fn instant(time: &Datetime) -> Option<SystemTime> {
    use toml::value::Offset;
    let date = time.date?;
    let days = days_since_1970(date.year.into(), date.month.into(), date.day.into());
    let days = u64::try_from(days).ok()?;
    let midnight = SystemTime::UNIX_EPOCH + Duration::from_secs(days * DAY);
    match (time.time, time.offset) {
        (None, None) => Some(midnight + Duration::from_secs(DAY)),
        (Some(clock), Some(offset)) => {
            let seconds = u64::from(clock.hour) * 3600
                + u64::from(clock.minute) * 60
                + u64::from(clock.second.unwrap_or(0));
            let local = midnight + Duration::from_secs(seconds);
            let east = match offset {
                Offset::Z => 0,
                Offset::Custom { minutes } => i64::from(minutes),
            };
            let by = Duration::from_secs(east.unsigned_abs() * 60);
            match east < 0 {
                true => local.checked_add(by),
                false => local.checked_sub(by),
            }
        }
        _ => None,
    }
}

/// The days from 1970-01-01 to a date of the Gregorian calendar. Years are counted from March, so that a leap day is the last.
fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

/// Times of day: `22:00-06:00`, in UTC or with an offset.
pub(super) fn window(value: &Value) -> Result<Window, String> {
    let wrong = || {
        format!(
            "{} is not a part of a day; for example \"22:00-06:00\" (UTC) or \"22:00-06:00 +02:00\"",
            shown(value)
        )
    };
    let text = text(value).map_err(|_| wrong())?;
    let (times, offset) = text.split_once(' ').unwrap_or((&text, "+00:00"));
    let (from, to) = times.split_once('-').ok_or_else(wrong)?;
    let minutes = |time: &str| {
        let (hour, minute) = time.split_once(':')?;
        let is_two_digits = |it: &str| it.len() == 2 && it.bytes().all(|b| b.is_ascii_digit());
        let (hour, minute) = match is_two_digits(hour) && is_two_digits(minute) {
            true => (hour.parse::<u16>().ok()?, minute.parse::<u16>().ok()?),
            false => return None,
        };
        (hour <= 24 && minute < 60 && (hour < 24 || minute == 0)).then_some(hour * 60 + minute)
    };
    let east = match (offset.strip_prefix('+'), offset.strip_prefix('-')) {
        (Some(east), _) => minutes(east).map(i32::from),
        (_, Some(west)) => minutes(west).map(|west| -i32::from(west)),
        _ => None,
    };
    let (from, to) = (minutes(from), minutes(to));
    match (from, to, east) {
        (Some(from), Some(to), Some(east))
            if from != to && from < 24 * 60 && east.abs() <= 14 * 60 =>
        {
            Ok(Window {
                from,
                to,
                east,
                text,
            })
        }
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn string(text: &str) -> Value {
        Value::String(text.to_owned())
    }

    fn seconds(value: &str) -> u64 {
        let at = expiry(&string(value)).unwrap().at;
        at.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
    }

    #[test]
    fn a_date_lasts_until_its_end() {
        // date -u -d '2027-02-01' +%s
        assert_eq!(seconds("2027-01-31"), 1_801_440_000);
        assert_eq!(seconds("2027-01-31T18:00:00Z"), 1_801_440_000 - 6 * 3600);
        assert_eq!(
            seconds("2027-01-31T18:00:00+02:00"),
            1_801_440_000 - 8 * 3600
        );
        assert_eq!(
            seconds("2027-01-31T18:00:00-02:00"),
            1_801_440_000 - 4 * 3600
        );
        assert_eq!(seconds("1970-01-01"), DAY);
        assert_eq!(seconds("2000-02-29"), 951_868_800);
        for bad in [
            "soon",
            "2027-13-01",
            "2027-01-31T18:00:00",
            "18:00:00",
            "1969-01-01",
        ] {
            let error = expiry(&string(bad)).unwrap_err();
            assert!(error.contains("2027-01-31T18:00:00Z"), "{error}");
        }
        assert!(expiry(&Value::Integer(2027)).is_err());
    }

    #[test]
    fn windows_are_parts_of_a_day() {
        let parsed = |text: &str| window(&string(text)).map(|it| (it.from, it.to, it.east));
        assert_eq!(parsed("22:00-06:00"), Ok((1320, 360, 0)));
        assert_eq!(parsed("00:00-24:00"), Ok((0, 1440, 0)));
        assert_eq!(parsed("08:30-17:00 -05:00"), Ok((510, 1020, -300)));
        for bad in [
            "",
            "22:00",
            "22-06",
            "22:00-22:00",
            "24:00-06:00",
            "25:00-06:00",
            "22:60-06:00",
            "22:00-24:01",
            "2:00-6:00",
            "22:00-06:00 2",
            "22:00-06:00 +15:00",
            "22:00-06:00 UTC",
        ] {
            let error = window(&string(bad)).unwrap_err();
            assert!(error.contains("22:00-06:00"), "{bad}: {error}");
        }
    }

    #[test]
    fn levels_are_numbers_or_percentages() {
        assert_eq!(level(&Value::Integer(500)), Ok(Level::Sockets(500)));
        assert_eq!(level(&string("80%")), Ok(Level::OfLimit(Percent(80))));
        for bad in [
            string("80"),
            string("0%"),
            string("101%"),
            Value::Integer(0),
            Value::Float(0.5),
        ] {
            let error = level(&bad).unwrap_err();
            assert!(error.contains("500 or \"50%\""), "{error}");
        }
    }

    #[test]
    fn a_listener_has_an_address_and_a_port() {
        let parsed = |text: &str| listen(&string(text));
        assert_eq!(
            parsed("127.0.0.1:9979"),
            Ok(Listen::Address("127.0.0.1:9979".parse().unwrap()))
        );
        assert_eq!(parsed("unix:/run/x"), Ok(Listen::Unix("/run/x".into())));
        assert_eq!(parsed("systemd"), Ok(Listen::Systemd));
        assert_eq!(parsed("none"), Ok(Listen::None));
        for bad in [
            "",
            "9979",
            "localhost",
            "unix:x",
            "127.0.0.1:0",
            "127.0.0.1",
        ] {
            let error = parsed(bad).unwrap_err();
            assert!(error.contains("127.0.0.1:9979"), "{bad}: {error}");
        }
    }

    #[test]
    fn a_number_without_a_unit_is_no_duration() {
        assert_eq!(duration(&string("10m")), Ok(Duration::from_secs(600)));
        let error = duration(&Value::Integer(90)).unwrap_err();
        assert!(error.contains("\"90s\""), "{error}");
        assert!(interval(&string("500ms")).is_err() && interval(&string("2d")).is_err());
    }

    #[test]
    fn a_name_fits_everywhere() {
        for good in ["tomcat-leak", "a", "7_x"] {
            assert_eq!(name(&string(good)).as_deref(), Ok(good));
        }
        let long = "x".repeat(64);
        for bad in ["", "-a", "a b", "a/b", "ü", &long] {
            assert!(name(&string(bad)).is_err(), "{bad}");
        }
    }
}
