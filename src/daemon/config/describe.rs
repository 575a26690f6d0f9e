//! What a configuration does, in words. Pure.

use std::fmt::Display;
use std::time::SystemTime;

use super::{DaemonConfig, HALF_OPEN, Level, Listen, Mode, Percent, Policy, Protection};
use crate::text::{age, counted, escape, shell_line};

/// How many sockets a policy selects now, and how many of them it would close if nothing but its selectors counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MatchedNow {
    /// Whatever their age.
    pub selected: usize,
    /// Those that are old and idle enough, and that no protection keeps.
    pub ready: usize,
}

impl DaemonConfig {
    /// What the daemon would do, one line each. `matched`: for each policy; `None` if the sockets could not be listed.
    pub fn sentences(&self, now: SystemTime, matched: &[Option<MatchedNow>]) -> Vec<String> {
        let mut lines = Vec::new();
        lines.push(match self.files.is_empty() {
            true => "no file of the configuration exists: these are the defaults".to_owned(),
            false => {
                let files = self
                    .files
                    .iter()
                    .map(|file| escape(&file.to_string_lossy()));
                format!("read: {}", list(files))
            }
        });
        let place = match self.all_netns {
            true => "every network namespace",
            false => "the network namespace that it runs in",
        };
        lines.push(format!(
            "the daemon looks into {place} every {}, and {}",
            age(self.interval),
            self.served()
        ));
        if self.policies.is_empty() {
            lines.push("there is no policy: it only observes".to_owned());
            return lines;
        }
        if !self.kept_from_acting.is_empty() {
            lines.push(format!(
                "--observe keeps policy {} from acting",
                self.kept_from_acting.join(", ")
            ));
        }
        let limits = &self.limits;
        lines.push(format!(
            "all policies together act on {} at most in a sweep, and on {} in an hour",
            sockets(limits.kills_per_sweep),
            limits.kills_per_hour
        ));
        lines.push(format!("no policy touches {}", self.protection.sentence()));
        for (index, policy) in self.policies.iter().enumerate() {
            let matched = matched.get(index).copied().flatten();
            policy.describe(now, matched, &mut lines);
        }
        lines
    }

    fn served(&self) -> String {
        match &self.listen {
            Listen::Address(address) if address.ip().is_loopback() => {
                format!("serves its metrics at http://{address}/metrics")
            }
            Listen::Address(address) => format!(
                "serves its metrics at http://{address}/metrics, which other hosts may reach"
            ),
            Listen::Unix(path) => format!(
                "serves its metrics at the unix socket {}",
                escape(&path.to_string_lossy())
            ),
            Listen::Systemd => "serves its metrics at the socket that systemd opens".to_owned(),
            Listen::None => "serves no metrics".to_owned(),
        }
    }
}

impl Policy {
    fn describe(&self, now: SystemTime, matched: Option<MatchedNow>, lines: &mut Vec<String>) {
        let file = escape(&self.file.to_string_lossy());
        lines.push(String::new());
        lines.push(format!(
            "policy {} ({file}:{}): {}",
            self.name,
            self.place.line,
            self.does(now)
        ));
        let mut add = |line: String| lines.push(format!("  {line}"));
        if let Some(reason) = &self.reason {
            add(format!("because: {}", escape(reason)));
        }
        add(format!("it selects what this selects: {}", self.command()));
        add(match matched {
            None => "the sockets could not be listed, so it is not known how many it selects now"
                .to_owned(),
            Some(now) => format!(
                "now it selects {}, of which {} old and idle enough, and not protected",
                counted(now.selected, "socket"),
                match now.ready {
                    1 => "1 is".to_owned(),
                    ready => format!("{ready} are"),
                }
            ),
        });
        let verb = match self.mode {
            Mode::Act => "closes",
            Mode::Observe => "would close",
        };
        let methods = self.methods.iter().map(|method| method.name());
        let methods: Vec<&str> = methods.collect();
        let reclaim = match self.reclaim {
            true => ", and then the descriptor in its process",
            false => "",
        };
        add(format!(
            "it {verb} a socket that it has selected in {} in a row, by {}{reclaim}",
            counted(usize::try_from(self.confirm).unwrap_or(usize::MAX), "sweep"),
            methods.join(", then ")
        ));
        if let Some(start) = self.start_above {
            let stop = self.stop_below.unwrap_or(start);
            add(format!(
                "only if its process has more than {} of them, and then until it has fewer than {}",
                level(start),
                level(stop)
            ));
        }
        add(format!(
            "at most {} in a sweep, {} in an hour, and in a sweep {} of those of one process",
            sockets(self.kills_per_sweep),
            self.kills_per_hour,
            percent(self.share)
        ));
        if !self.windows.is_empty() {
            let windows = self.windows.iter().map(|window| window.text.as_str());
            let is_in = match self.windows.iter().any(|window| window.contains(now)) {
                true => "now is in it",
                false => "now is not in it",
            };
            add(format!(
                "only in {} (UTC without an offset); {is_in}",
                list(windows)
            ));
        }
        let rules = &self.breaker;
        add(format!(
            "its circuit breaker opens if {} acts in a row as many come back as were closed, if more than {} of the acts fail, if {} \
             times as many sockets match as usual, if {} within {} sweeps after an act, or if a process spins after one",
            rules.sweeps,
            percent(rules.failures),
            rules.surge,
            match rules.restarts {
                1 => "a process ends".to_owned(),
                restarts => format!("{restarts} processes end"),
            },
            rules.sweeps
        ));
        add(format!(
            "it then observes for {}, and tries again with {HALF_OPEN} sockets in a sweep",
            age(rules.cooldown)
        ));
    }

    /// Whether it acts.
    fn does(&self, now: SystemTime) -> String {
        match (self.mode, &self.expires) {
            (Mode::Observe, _) => "observes, and closes nothing".to_owned(),
            (Mode::Act, Some(end)) if now >= end.at => {
                format!("observes: it has expired ({})", end.text)
            }
            (Mode::Act, Some(end)) => format!("acts until {}", end.text),
            (Mode::Act, None) => "acts".to_owned(),
        }
    }

    /// The command that lists the same sockets.
    fn command(&self) -> String {
        let times = [
            ("--min-age", self.selectors.min_age),
            ("--min-idle", self.selectors.min_idle),
        ];
        let times = times.into_iter().filter(|(_, time)| !time.is_zero());
        let times = times.map(|(option, time)| {
            format!("{option}={}", humantime::format_duration(time)).replace(' ', "")
        });
        let dry = std::iter::once("-n".to_owned());
        let words: Vec<String> = dry.chain(times).chain(self.words.iter().cloned()).collect();
        // A word comes from the file, which may have anything in it.
        format!("cwkill {}", escape(&shell_line(&words)))
    }
}

impl Protection {
    /// What no policy may touch, in words.
    fn sentence(&self) -> String {
        let mut parts = Vec::new();
        let mut add = |what: &str, names: Vec<String>| {
            if !names.is_empty() {
                parts.push(format!("{what} {}", list(names)));
            }
        };
        let numbers =
            |numbers: &mut dyn Iterator<Item = u64>| numbers.map(|it| it.to_string()).collect();
        let texts = |names: &[String]| names.iter().map(|name| escape(name)).collect();
        add(
            "local port",
            numbers(&mut self.ports.iter().map(|it| u64::from(*it))),
        );
        add(
            "the sockets of user",
            numbers(&mut self.users.iter().map(|it| u64::from(*it))),
        );
        add("unit", texts(&self.units));
        add("process", texts(&self.processes));
        match parts.is_empty() {
            true => "what it does not select; nothing else is protected".to_owned(),
            false => parts.join("; "),
        }
    }
}

fn list<T: Display>(names: impl IntoIterator<Item = T>) -> String {
    let names: Vec<String> = names.into_iter().map(|name| name.to_string()).collect();
    names.join(", ")
}

fn sockets(count: u32) -> String {
    counted(usize::try_from(count).unwrap_or(usize::MAX), "socket")
}

fn percent(Percent(percent): Percent) -> String {
    format!("{percent} %")
}

fn level(level: Level) -> String {
    match level {
        Level::Sockets(number) => number.to_string(),
        Level::OfLimit(part) => format!("{} of its limit of open files", percent(part)),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// 2027-01-15 08:00 UTC.
    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
    }

    fn said(text: &str, matched: &[Option<MatchedNow>]) -> String {
        let config = DaemonConfig::parse(text).unwrap();
        config.sentences(now(), matched).join("\n")
    }

    #[test]
    fn without_a_policy_it_observes() {
        let said = said("", &[]);
        assert!(
            said.contains("no file of the configuration exists"),
            "{said}"
        );
        assert!(said.contains("http://127.0.0.1:9979/metrics"), "{said}");
        assert!(said.ends_with("it only observes"), "{said}");
    }

    #[test]
    fn a_policy_is_said_in_words() {
        let text = r#"
[[policy]]
name = "tomcat-leak"
reason = "ticket 4711"
mode = "act"
expires = 2027-01-31
match = { process = "java", expression = "sport = :8080" }
min_age = "90m"
start_above = "50%"
stop_below = "30%"
reclaim = true
window = ["22:00-06:00"]
"#;
        let matched = MatchedNow {
            selected: 12,
            ready: 1,
        };
        let said = said(text, &[Some(matched)]);
        for part in [
            "policy tomcat-leak (daemon.toml:3): acts until 2027-01-31",
            "  because: ticket 4711",
            "cwkill -n --min-age=1h30m --min-idle=5s --process=java -- 'sport = :8080'",
            "now it selects 12 sockets, of which 1 is old",
            "it closes a socket that it has selected in 2 sweeps in a row, by shutdown, then destroy, then rst, and then the descriptor",
            "more than 50 % of its limit of open files of them, and then until it has fewer than 30 %",
            "at most 100 sockets in a sweep, 1000 in an hour, and in a sweep 50 % of those",
            "only in 22:00-06:00 (UTC without an offset); now is not in it",
            "if a process ends within 3 sweeps",
            "observes for 1h00m, and tries again with 10 sockets",
            "no policy touches local port 22; unit ssh.service",
        ] {
            assert!(said.contains(part), "{said}\nhas no {part}");
        }
    }

    #[test]
    fn an_expired_policy_and_an_unknown_number_are_said() {
        let text = "[[policy]]\nname = \"a\"\nmode = \"act\"\nexpires = 2020-01-01\nmin_age = \"1m\"\nmatch = { all = true }\n\
                    [[policy]]\nname = \"b\"\nmatch = { all = true }\n";
        let said = said(text, &[None, None]);
        assert!(
            said.contains("observes: it has expired (2020-01-01)"),
            "{said}"
        );
        assert!(
            said.contains("policy b (daemon.toml:8): observes, and closes nothing"),
            "{said}"
        );
        assert!(said.contains("it would close a socket"), "{said}");
        assert!(said.contains("not known how many"), "{said}");
    }

    #[test]
    fn nothing_protected_is_said() {
        let all = Protection::default();
        let words = |names: &[String]| {
            names
                .iter()
                .map(|it| format!("\"{it}\""))
                .collect::<Vec<_>>()
                .join(",")
        };
        let text = format!(
            "[protect.remove]\nports = [22]\nunits = [{}]\nprocesses = [{}]\n[[policy]]\nname = \"a\"\nmatch = {{ all = true }}\n",
            words(&all.units),
            words(&all.processes)
        );
        assert!(said(&text, &[]).contains("nothing else is protected"));
    }
}
