//! What to do about descriptors that a run has kept: once per process, with the rule of its language runtime. Pure.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use humantime::format_duration;
use serde::Serialize;

use crate::config::DEFAULT_RECLAIM_AGE;
use crate::diagnose::inside::Inside;
use crate::diagnose::limit::ReachedLimit;
use crate::diagnose::suggest::LanguageRuntime;
use crate::model::{InUse, Owner, ReclaimOutcome, ReclaimReason};
use crate::proc::{Process, ProcessId, RemoteFd};
use crate::reclaim::ReclaimRules;
use crate::text::counted;

/// The maximum number of processes for which people get a line.
const MAX_SHOWN: usize = 10;

/// The descriptors that were kept in one process.
#[derive(Debug)]
pub struct Kept<'a> {
    pub process: Arc<Process>,
    /// Each with the reason.
    pub descriptors: Vec<(RemoteFd, &'a ReclaimReason)>,
    pub facts: Facts,
}

/// The facts about a process that decide what to do.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// `None`: unknown.
    pub runtime: Option<LanguageRuntime>,
    /// Its limit of descriptors, if it is at the limit.
    pub reached: Option<ReachedLimit>,
    /// The way into its container, if it is in one.
    pub inside: Option<Inside>,
}

impl Kept<'_> {
    fn knows_numbers(&self) -> bool {
        self.facts
            .runtime
            .is_some_and(LanguageRuntime::knows_numbers)
    }

    /// The number of descriptors that are in use in this way.
    fn count(&self, is: fn(&InUse) -> bool) -> usize {
        let reasons = self.descriptors.iter().map(|(_, reason)| reason);
        reasons
            .filter(|reason| matches!(reason, ReclaimReason::InUse(in_use) if is(in_use)))
            .count()
    }
}

/// The descriptors among `owners` that were kept, by process.
pub fn kept<'o>(
    owners: impl Iterator<Item = &'o Owner>,
    facts: &dyn Fn(&Process) -> Facts,
) -> Vec<Kept<'o>> {
    let mut kept: BTreeMap<ProcessId, Kept<'o>> = BTreeMap::new();
    for owner in owners {
        if let Some(reason) = owner.reclaim.as_ref().and_then(ReclaimOutcome::reason) {
            let of_process = kept.entry(owner.process.id).or_insert_with(|| Kept {
                process: Arc::clone(&owner.process),
                descriptors: Vec::new(),
                facts: facts(&owner.process),
            });
            of_process.descriptors.push((owner.fd, reason));
        }
    }
    kept.into_values().collect()
}

/// What the operator can do about descriptors that were kept in a process. It is printed as one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advice {
    pub process: Arc<Process>,
    pub kept: usize,
    /// A stable name of the rule, for programs.
    pub code: &'static str,
    /// Without the process.
    pub text: String,
    /// How long to wait before the commands.
    pub after: Option<String>,
    /// The commands to run, in this order.
    pub commands: Vec<String>,
}

impl fmt::Display for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.process, self.text)
    }
}

/// The run that has kept the descriptors.
#[derive(Clone, Copy, Debug)]
pub struct KeptBy<'a> {
    pub rules: &'a ReclaimRules,
    /// It has closed the sockets too, so they have been quiet only since then.
    pub closed_sockets: bool,
    /// It has not acted: the descriptors would be kept.
    pub predicted: bool,
}

/// The advice for each process, at most one for the rule of its runtime, one for its unread bytes and one for its young sockets.
pub fn advise(kept: &[Kept<'_>], by: KeptBy<'_>) -> Vec<Advice> {
    let advice = kept
        .iter()
        .flat_map(|one| [runtime_rule(one, by), unread(one, by), young(one, by)]);
    advice.flatten().collect()
}

fn kept_text(count: usize, by: KeptBy<'_>) -> String {
    match by.predicted {
        false => format!("{count} kept"),
        true => format!("{count} would be kept"),
    }
}

/// The rule of the runtime: its event loop or its collector knows the descriptors by their numbers.
fn runtime_rule(kept: &Kept<'_>, by: KeptBy<'_>) -> Option<Advice> {
    use LanguageRuntime::{Go, Jvm, Node};
    let pid = kept.process.id.pid;
    let collected = kept.count(|in_use| matches!(in_use, InUse::Finalizer(_)));
    let watched = kept.count(|in_use| matches!(in_use, InUse::InEpoll(_)));
    let unread = match kept.knows_numbers() {
        true => kept.count(is_unread),
        false => 0,
    };
    let total = collected + watched + unread;
    if total == 0 {
        return None;
    }
    let force = force_command(pid);
    let number = kept_text(total, by);
    let lost = match unread {
        0 => String::new(),
        unread => format!(" ({unread} of them have unread bytes, which are lost then)"),
    };
    let (code, text, commands) = match kept.facts.runtime {
        Some(Jvm) => {
            let collect = match &kept.facts.inside {
                Some(inside) => inside.run(&format!("jcmd {} GC.run", inside.pid)),
                None => format!("jcmd {pid} GC.run"),
            };
            let room = kept.facts.reached.map(|limit| room_for_jcmd(kept, limit));
            let (first, command) = room.unzip();
            (
                "garbage-collector",
                format!(
                    "{number}: its garbage collector may close these numbers after reuse. Run {}`{collect}` twice, then \
                     `{force}`{lost}",
                    first.unwrap_or_default()
                ),
                command
                    .into_iter()
                    .chain([collect.clone(), collect, force])
                    .collect(),
            )
        }
        Some(Go) => (
            "garbage-collector",
            format!(
                "{number}: its garbage collector may close these numbers after reuse. Wait 5 minutes (Go collects at least every \
                 2 minutes), then `{force}`{lost}"
            ),
            vec![force],
        ),
        Some(Node) => (
            "event-loop",
            format!(
                "{number}: its event loop knows these numbers. If the program destroys the sockets later, it closes other connections \
                 that have the numbers by then. To free them all the same, run `{force}`{lost}"
            ),
            vec![force],
        ),
        _ if collected > 0 => (
            "garbage-collector",
            format!(
                "{number}: its garbage collector may close these numbers after reuse. Let it collect twice, then run `{force}`{lost}"
            ),
            vec![force],
        ),
        _ => (
            "event-loop",
            format!(
                "{number}: they are in its epoll set. If it is a Go program, wait 5 minutes, until its garbage collector has run twice. \
                 If its event loop closes them later, it closes other connections that have the numbers by then. To free them all the \
                 same, run `{force}`"
            ),
            vec![force],
        ),
    };
    Some(Advice {
        process: Arc::clone(&kept.process),
        kept: total,
        code,
        text,
        after: (kept.facts.runtime == Some(Go)).then(|| "5 minutes".to_owned()),
        commands,
    })
}

/// Descriptors that are freed so that jcmd can attach. It needs two for its socket, and the JVM opens some files for its classes.
const FREE_FOR_JCMD: usize = 10;

/// The step before jcmd, as the start of a sentence, and its command: a JVM at its limit cannot accept the connection of jcmd.
fn room_for_jcmd(kept: &Kept<'_>, limit: ReachedLimit) -> (String, String) {
    let pid = kept.process.id.pid;
    if limit.can_be_raised() {
        let (raise, needs) = limit.raise(pid);
        let text = format!("`{raise}`{needs}, since jcmd needs a free descriptor, then ");
        return (text, raise);
    }
    // Only those whose loss costs no bytes, the youngest first: a program has used a young number least.
    let is_collected = |reason: &ReclaimReason| {
        matches!(
            reason,
            ReclaimReason::InUse(InUse::Finalizer(_) | InUse::InEpoll(_))
        )
    };
    let collected = kept
        .descriptors
        .iter()
        .filter(|(_, reason)| is_collected(reason));
    let mut fds: Vec<i32> = collected.map(|(fd, _)| fd.0).collect();
    fds.sort_unstable_by_key(|fd| std::cmp::Reverse(*fd));
    fds.truncate(FREE_FOR_JCMD);
    let fds: Vec<String> = fds.iter().map(ToString::to_string).collect();
    let some = format!("{} --fd {}", force_command(pid), fds.join(","));
    let text = format!(
        "`{some}`, so that jcmd can attach (nobody has CAP_SYS_RESOURCE here to raise the limit), then "
    );
    (text, some)
}

/// What the program may still read, where its runtime has no rule for that.
fn unread(kept: &Kept<'_>, by: KeptBy<'_>) -> Option<Advice> {
    let count = match kept.knows_numbers() {
        true => 0,
        false => kept.count(is_unread),
    };
    let force = force_command(kept.process.id.pid);
    (count > 0).then(|| Advice {
        process: Arc::clone(&kept.process),
        kept: count,
        code: "unread",
        text: format!(
            "{}: the program may still read their unread bytes. To free them all the same, and to lose these bytes, run `{force}`",
            kept_text(count, by)
        ),
        after: None,
        commands: vec![force],
    })
}

fn is_unread(in_use: &InUse) -> bool {
    matches!(in_use, InUse::Unread(_) | InUse::KernelTls)
}

fn force_command(pid: i32) -> String {
    format!("cwkill reclaim --pid {pid} --reclaim-force")
}

/// When the sockets will have been quiet for long enough.
fn young(kept: &Kept<'_>, by: KeptBy<'_>) -> Option<Advice> {
    let quiet = kept
        .descriptors
        .iter()
        .filter_map(|(_, reason)| match reason {
            ReclaimReason::InUse(InUse::TooYoung(quiet)) => Some(*quiet),
            _ => None,
        });
    let quiet: Vec<Duration> = quiet.collect();
    let youngest = *quiet.iter().min()?;
    let min_age = by.rules.min_age;
    let wait = match by.closed_sockets {
        true => min_age,
        false => min_age.saturating_sub(youngest),
    };
    let command = reclaim_command(kept.process.id.pid, by.rules);
    Some(Advice {
        process: Arc::clone(&kept.process),
        kept: quiet.len(),
        code: "too-young",
        text: format!(
            "{}: their peers were heard within the last {} (--reclaim-age); in {}: {command}",
            kept_text(quiet.len(), by),
            format_duration(min_age),
            wait_text(wait)
        ),
        after: Some(wait_text(wait)),
        commands: vec![command],
    })
}

/// The command that closes the dead descriptors of a process, with the rules of this run.
pub fn reclaim_command(pid: i32, rules: &ReclaimRules) -> String {
    let age = match rules.min_age {
        DEFAULT_RECLAIM_AGE => String::new(),
        // Without spaces, which would be other arguments.
        age => format!(
            " --reclaim-age {}",
            format_duration(age).to_string().replace(' ', "")
        ),
    };
    let force = if rules.force { " --reclaim-force" } else { "" };
    format!("cwkill reclaim --pid {pid}{age}{force}")
}

/// A time to wait, rounded up to seconds, in whole minutes if it is some.
pub fn wait_text(time: Duration) -> String {
    let seconds = time.as_secs() + u64::from(time.subsec_nanos() > 0);
    let count = |count: u64| usize::try_from(count).unwrap_or(usize::MAX);
    match seconds {
        60.. if seconds.is_multiple_of(60) => counted(count(seconds / 60), "minute"),
        _ => counted(count(seconds), "second"),
    }
}

/// The lines for people.
pub fn lines(advice: &[Advice]) -> Vec<String> {
    let mut lines: Vec<String> = advice
        .iter()
        .take(MAX_SHOWN)
        .map(ToString::to_string)
        .collect();
    if advice.len() > MAX_SHOWN {
        let rest = advice.len() - MAX_SHOWN;
        lines.push(format!("and {rest} more lines like these: --json has all"));
    }
    lines
}

/// An advice in JSON.
#[derive(Serialize)]
pub struct JsonAdvice<'a> {
    pid: i32,
    comm: &'a str,
    kept: usize,
    advice_code: &'static str,
    text: &'a str,
    after: Option<&'a str>,
    commands: &'a [String],
}

pub fn json_advice(advice: &[Advice]) -> Vec<JsonAdvice<'_>> {
    let json = |one| {
        let Advice {
            process,
            kept,
            code,
            text,
            after,
            commands,
        }: &Advice = one;
        JsonAdvice {
            pid: process.id.pid,
            comm: &process.comm,
            kept: *kept,
            advice_code: code,
            text,
            after: after.as_deref(),
            commands,
        }
    };
    advice.iter().map(json).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proc::cgroup::Cgroup;
    use crate::proc::testdata::process;

    const RULES: ReclaimRules = ReclaimRules {
        min_age: Duration::from_secs(60),
        force: false,
        replace: false,
        stop_limit: Duration::from_millis(100),
    };
    const RUN: KeptBy<'_> = KeptBy {
        rules: &RULES,
        closed_sockets: true,
        predicted: false,
    };

    fn advice(
        runtime: Option<LanguageRuntime>,
        reasons: &[InUse],
        reached: Option<ReachedLimit>,
        by: KeptBy<'_>,
    ) -> Vec<Advice> {
        let reasons: Vec<ReclaimReason> =
            reasons.iter().cloned().map(ReclaimReason::InUse).collect();
        let kept = Kept {
            process: process(4711, "java"),
            descriptors: (7..).map(RemoteFd).zip(&reasons).collect(),
            facts: Facts {
                runtime,
                reached,
                inside: None,
            },
        };
        advise(&[kept], by)
    }

    fn full_at_64(may_raise_hard: bool) -> ReachedLimit {
        ReachedLimit {
            soft: 64,
            hard: Some(64),
            may_raise_hard,
        }
    }

    #[test]
    fn each_runtime_has_its_rule() {
        let (jvm, finalizer) = (
            Some(LanguageRuntime::Jvm),
            InUse::Finalizer("VM Thread".into()),
        );
        let of = advice(jvm, &[finalizer.clone(), finalizer.clone()], None, RUN).remove(0);
        assert_eq!(
            of.to_string(),
            "java/4711: 2 kept: its garbage collector may close these numbers after reuse. Run `jcmd 4711 GC.run` twice, \
             then `cwkill reclaim --pid 4711 --reclaim-force`"
        );
        let collect = "jcmd 4711 GC.run";
        assert_eq!(
            of.commands,
            [
                collect,
                collect,
                "cwkill reclaim --pid 4711 --reclaim-force"
            ]
        );
        let reasons = [ReclaimReason::InUse(finalizer.clone())];
        let mut in_docker = Cgroup::parse(&format!("0::/docker/{}\n", "3f4a9b2c".repeat(8)));
        in_docker.container.as_mut().unwrap().name = Some("web".into());
        let kept = Kept {
            process: process(4711, "java"),
            descriptors: (7..).map(RemoteFd).zip(&reasons).collect(),
            facts: Facts {
                runtime: jvm,
                reached: None,
                inside: Inside::of(&in_docker, &[4711, 1]),
            },
        };
        let advice_inside = advise(&[kept], RUN).remove(0);
        assert_eq!(advice_inside.commands[0], "docker exec web jcmd 1 GC.run");
        assert!(
            advice_inside
                .text
                .contains("`docker exec web jcmd 1 GC.run` twice")
        );
        let full = advice(
            jvm,
            &[finalizer.clone(), InUse::Unread(5)],
            Some(full_at_64(true)),
            RUN,
        );
        let text = full[0].to_string();
        assert!(
            text.contains("2 kept") && text.contains("1 of them have unread bytes"),
            "{text}"
        );
        assert!(
            text.contains(
                "Run `prlimit --pid 4711 --nofile=128:128` (needs CAP_SYS_RESOURCE), since jcmd"
            ),
            "{text}"
        );
        assert_eq!(full[0].commands.len(), 4);
        // Nobody here may raise the limit: some numbers are freed first.
        let many = vec![finalizer.clone(); 12];
        let bound = advice(jvm, &many, Some(full_at_64(false)), RUN).remove(0);
        let some = "cwkill reclaim --pid 4711 --reclaim-force --fd 18,17,16,15,14,13,12,11,10,9";
        assert_eq!(bound.commands[0], some);
        assert_eq!(bound.commands.len(), 4);
        assert!(
            bound.text.contains("nobody has CAP_SYS_RESOURCE"),
            "{bound}"
        );
        for (runtime, code, part) in [
            (
                Some(LanguageRuntime::Go),
                "garbage-collector",
                "Wait 5 minutes",
            ),
            (
                Some(LanguageRuntime::Node),
                "event-loop",
                "destroys the sockets",
            ),
            (None, "event-loop", "If it is a Go program"),
        ] {
            let of = advice(runtime, &[InUse::InEpoll(4)], None, RUN).remove(0);
            assert_eq!(of.code, code);
            assert!(of.text.contains(part), "{of}");
            assert!(
                of.text
                    .contains("`cwkill reclaim --pid 4711 --reclaim-force`"),
                "{of}"
            );
        }
        let mono = advice(None, &[finalizer], None, RUN).remove(0);
        assert!(mono.text.contains("Let it collect twice"), "{mono}");
    }

    #[test]
    fn unread_bytes_need_force() {
        let both = [InUse::Unread(5), InUse::InEpoll(4), InUse::Unread(7)];
        for runtime in [None, Some(LanguageRuntime::Python)] {
            let of = advice(runtime, &both, None, RUN);
            let kept: Vec<_> = of.iter().map(|one| (one.code, one.kept)).collect();
            assert_eq!(kept, [("event-loop", 1), ("unread", 2)]);
            assert_eq!(
                of[1].commands,
                ["cwkill reclaim --pid 4711 --reclaim-force"]
            );
        }
        let node = advice(Some(LanguageRuntime::Node), &both, None, RUN);
        assert_eq!((node.len(), node[0].kept), (1, 3));
    }

    #[test]
    fn young_sockets_have_a_time() {
        let young = [
            InUse::TooYoung(Duration::from_secs(15)),
            InUse::TooYoung(Duration::from_secs(50)),
        ];
        let text = |by| advice(None, &young, None, by).remove(0).text;
        let after_close = text(RUN);
        assert_eq!(
            after_close,
            "2 kept: their peers were heard within the last 1m (--reclaim-age); in 1 minute: cwkill reclaim --pid 4711"
        );
        let later = text(KeptBy {
            closed_sockets: false,
            predicted: true,
            ..RUN
        });
        assert!(later.starts_with("2 would be kept"), "{later}");
        assert!(
            later.ends_with("in 45 seconds: cwkill reclaim --pid 4711"),
            "{later}"
        );
        let rules = ReclaimRules {
            min_age: Duration::from_secs(600),
            ..RULES
        };
        let longer = text(KeptBy {
            rules: &rules,
            ..RUN
        });
        let ending = "in 10 minutes: cwkill reclaim --pid 4711 --reclaim-age 10m";
        assert!(longer.ends_with(ending), "{longer}");
    }

    #[test]
    fn a_wait_is_rounded_up() {
        let text = |millis| wait_text(Duration::from_millis(millis));
        assert_eq!(text(1), "1 second");
        assert_eq!(text(59_001), "1 minute");
        assert_eq!(text(90_000), "90 seconds");
        assert_eq!(text(0), "0 seconds");
    }

    #[test]
    fn the_man_page_lists_every_rule() {
        let page = include_str!("../../man/cwkill-reclaim.8");
        for code in ["garbage-collector", "event-loop", "unread", "too-young"] {
            let line = format!("\n.B {}\n", code.replace('-', "\\-"));
            assert!(page.contains(&line), "{code}");
        }
    }
}
