//! The report of an examination: lines for people, and one JSON document.

use std::io::{self, Write};

use caps::Capability;
use serde::Serialize;

use crate::bpf::NotSeen;
use crate::conntrack::EventsSent;
use crate::doctor::Examination;
use crate::doctor::advice::Advice;
use crate::doctor::confinement::{Confinement, Engine};
use crate::doctor::container_names::{ContainerNames, NameCounts};
use crate::doctor::host::{CAPABILITIES, HostInfo, ProcessCounts, UnreachableProcess};
use crate::doctor::missing::{Missing, MissingOption};
use crate::doctor::row::{MethodRow, Support};
use crate::doctor::tracing::Tracing;
use crate::doctor::trials::TrialResult;
use crate::finder::way::MANY_FILES;
use crate::model::TimeAndPlace;
use crate::proc::NameDirectory;
use crate::proc::cgroup::Runtime;
use crate::report::serialize::{JsonTimeAndPlace, json_time_and_place};
use crate::text::{counted, escape, wrap};

const SCHEMA_VERSION: u32 = 1;

/// The exit status: 0 if `auto` works fully, 1 if it works partly or could not be tried, 3 if it does not work.
pub fn status(examination: &Examination) -> u8 {
    match examination.advice.auto {
        Support::Yes => 0,
        Support::Partly | Support::Untried => 1,
        Support::No => 3,
    }
}

/// One fact about the host.
#[derive(Serialize)]
struct CheckLine {
    name: &'static str,
    /// `None`: it is neither good nor bad.
    ok: Option<bool>,
    detail: String,
}

/// The verdict in words, with the methods of `auto` that do not work fully.
fn verdict(advice: &Advice) -> String {
    let verdict = match advice.auto {
        Support::Yes => "auto works fully here",
        Support::Partly => "auto works in part here",
        Support::Untried => "whether auto works here could not be tested",
        Support::No => "auto does not work here",
    };
    let less = advice.rows.iter();
    let less = less.filter(|row| row.auto && row.works != Support::Yes);
    let less: Vec<String> = less
        .map(|row| format!("{} {}", row.name, row.works.name()))
        .collect();
    match advice.auto {
        Support::Partly => format!("{verdict}: {}", less.join(", ")),
        _ => verdict.to_owned(),
    }
}

/// Writes lines for people: the verdict first. `columns`: the width of the terminal, if it is one.
pub fn write_text(
    examination: &Examination,
    columns: Option<usize>,
    out: &mut dyn Write,
) -> io::Result<()> {
    let advice = &examination.advice;
    let mut lines = Lines { out, columns };
    lines.put(&verdict(advice), 2)?;
    for line in &advice.meaning {
        lines.put(line, 2)?;
    }
    if !advice.rows.is_empty() {
        lines.put("", 0)?;
        let header = format!(
            "{:<10} {:<8} {:<14} {:<14} {:<14}",
            "METHOD", "WORKS", "THIS USER'S", "OTHERS'", "WITHOUT OWNER"
        );
        lines.put(&header, 0)?;
    }
    for row in &advice.rows {
        let ownerless = row.ownerless.map_or("-", Support::name);
        let line = format!(
            "{:<10} {:<8} {:<14} {:<14} {ownerless}",
            row.name,
            row.works.name(),
            row.own.name(),
            row.others.name(),
        );
        lines.put(&line, 0)?;
        for why in &row.why {
            lines.put(&format!("    why: {why}"), 6)?;
        }
    }
    let mut changes: Vec<(&str, Vec<&str>)> = Vec::new();
    for row in &advice.rows {
        for change in &row.change {
            match changes.iter_mut().find(|(known, _)| known == change) {
                Some((_, methods)) => methods.push(row.name),
                None => changes.push((change, vec![row.name])),
            }
        }
    }
    for (change, methods) in changes {
        lines.put("", 0)?;
        lines.put(&format!("to change, for {}:", methods.join(", ")), 2)?;
        let mut parts = change.lines();
        if let Some(sentence) = parts.next() {
            lines.put(&format!("    {sentence}"), 6)?;
        }
        // Commands, to be copied: they are not broken.
        for command in parts {
            lines.put_whole(&format!("    {command}"))?;
        }
    }
    write_missing(&examination.missing, &mut lines)?;
    lines.put("", 0)?;
    for CheckLine { name, ok, detail } in checks(examination) {
        let mark = match ok {
            Some(true) => "ok",
            Some(false) => "no",
            None => "-",
        };
        let line = format!("{name:<21} {mark:<3} {detail}");
        lines.put(line.trim_end(), DETAIL)?;
    }
    Ok(())
}

/// The column in which the detail of a check begins.
const DETAIL: usize = 26;

/// Where lines go.
struct Lines<'w> {
    out: &'w mut dyn Write,
    /// The width of the terminal, if it is one.
    columns: Option<usize>,
}

impl Lines<'_> {
    /// Writes a line, broken between words. All rows but the first begin with `indent` spaces.
    fn put(&mut self, line: &str, indent: usize) -> io::Result<()> {
        let Some(columns) = self.columns else {
            return self.put_whole(line);
        };
        wrap(line, columns, indent)
            .iter()
            .try_for_each(|row| self.put_whole(row))
    }

    fn put_whole(&mut self, line: &str) -> io::Result<()> {
        writeln!(self.out, "{line}")
    }
}

/// Writes what the settings of the container lack.
fn write_missing(missing: &Missing, lines: &mut Lines<'_>) -> io::Result<()> {
    let Missing {
        run_options,
        manifest,
    } = missing;
    if !run_options.is_empty() {
        let options: Vec<&str> = run_options.iter().map(|it| it.option.as_str()).collect();
        lines.put("", 0)?;
        let title = "missing in the `docker run` or `podman run` line of this container:";
        lines.put(title, 2)?;
        // To be copied, as the manifest below.
        lines.put_whole(&format!("    {}", options.join(" ")))?;
        for MissingOption { option, without } in run_options {
            lines.put(&format!("    without {option}: {without}"), 6)?;
        }
    }
    if !manifest.is_empty() {
        lines.put("", 0)?;
        lines.put("missing below `spec` in the manifest of this pod:", 2)?;
        for line in manifest {
            lines.put_whole(&format!("    {line}"))?;
        }
    }
    Ok(())
}

/// Writes one JSON document.
pub fn write_json(
    examination: &Examination,
    time_and_place: &TimeAndPlace,
    out: &mut dyn Write,
) -> io::Result<()> {
    #[derive(Serialize)]
    struct DoctorDocument<'a> {
        schema_version: u32,
        cwkill_version: &'static str,
        #[serde(flatten)]
        time_and_place: JsonTimeAndPlace<'a>,
        auto: Support,
        /// The verdict and its meaning, in words that may change.
        verdict: String,
        meaning: &'a [String],
        methods: &'a [MethodRow],
        unreachable: &'a [UnreachableProcess],
        confinement: JsonConfinement<'a>,
        checks: Vec<CheckLine>,
    }
    let document = DoctorDocument {
        schema_version: SCHEMA_VERSION,
        cwkill_version: env!("CARGO_PKG_VERSION"),
        time_and_place: json_time_and_place(time_and_place),
        auto: examination.advice.auto,
        verdict: verdict(&examination.advice),
        meaning: &examination.advice.meaning,
        methods: &examination.advice.rows,
        unreachable: match &examination.host.reachability {
            Ok(reachability) => &reachability.unreachable,
            Err(_) => &[],
        },
        confinement: json_confinement(examination),
        checks: checks(examination),
    };
    writeln!(out, "{}", crate::report::serialize::line(&document))
}

/// What confines cwkill.
#[derive(Serialize)]
struct JsonConfinement<'a> {
    /// What runs the container; null without one.
    container: Option<&'a str>,
    first_pid_namespace: bool,
    seccomp_mode: Option<u8>,
    label: Option<&'a str>,
    name_directories: &'a [NameDirectory],
    missing: &'a Missing,
}

fn json_confinement(examination: &Examination) -> JsonConfinement<'_> {
    let confinement = &examination.host.confinement;
    JsonConfinement {
        container: confinement.container.as_ref().map(Engine::name),
        first_pid_namespace: confinement.first_pid_namespace,
        seccomp_mode: confinement.seccomp,
        label: confinement.label.as_deref(),
        name_directories: match &confinement.name_directories {
            Ok(directories) => directories,
            Err(_) => &[],
        },
        missing: &examination.missing,
    }
}

/// The lines about what confines cwkill.
fn confinement_checks(examination: &Examination) -> [CheckLine; 5] {
    let Confinement {
        container,
        first_pid_namespace,
        netns_of_init: _,
        seccomp,
        label,
        name_directories,
    } = &examination.host.confinement;
    let check = |name, ok, detail: String| CheckLine { name, ok, detail };
    let found = name_directories.as_deref().unwrap_or_default();
    let directory = |one: &NameDirectory| match &one.error {
        None => one.path.clone(),
        Some(error) => format!("not {} ({error})", one.path),
    };
    let names: Vec<String> = found.iter().map(directory).collect();
    [
        check(
            "container",
            None,
            match container {
                None => "cwkill runs in none".to_owned(),
                Some(engine) => format!("cwkill runs in one: {}", escape(engine.name())),
            },
        ),
        check(
            "pid namespace",
            Some(*first_pid_namespace),
            match first_pid_namespace {
                true => "the first: every process of the host is seen".to_owned(),
                false => "not the first: processes outside it are not seen".to_owned(),
            },
        ),
        check(
            "seccomp filter",
            None,
            match seccomp {
                None => "unknown".to_owned(),
                Some(0) => "none".to_owned(),
                Some(2) => {
                    "on cwkill: reclaim then leaves alone processes that have one".to_owned()
                }
                Some(mode) => format!("mode {mode}"),
            },
        ),
        check(
            "security label",
            None,
            escape(label.as_deref().unwrap_or("none")),
        ),
        match name_directories {
            Err(error) => check("files with names", Some(false), escape(error)),
            Ok(found) => check(
                "files with names",
                (!found.is_empty()).then(|| found.iter().all(|one| one.error.is_none())),
                match names.is_empty() {
                    true => "no directory of a container runtime is seen here".to_owned(),
                    false => escape(&names.join(", ")),
                },
            ),
        },
    ]
}

fn checks(examination: &Examination) -> Vec<CheckLine> {
    let HostInfo {
        kernel,
        uid,
        capabilities,
        first_user_namespace,
        has_seccomp_filter: _,
        user_namespaces_forbidden,
        ptrace_scope,
        hidepid,
        namespaces,
        reachability,
        pidfd_getfd,
        kcmp: _,
        repair,
        raw_v4,
        raw_v6,
        capture,
        tracked,
        conntrack_events,
        ipv6: _,
        iterator,
        container_names,
        confinement: _,
    } = &examination.host;
    let check = |name, ok, detail: String| CheckLine { name, ok, detail };
    let io_check = |name, result: &io::Result<()>| match result {
        Ok(()) => check(name, Some(true), String::new()),
        Err(error) => check(name, Some(false), error.to_string()),
    };
    let has = |capability| capabilities.contains(&capability);
    let (held, missing): (Vec<_>, Vec<_>) = CAPABILITIES
        .into_iter()
        .partition(|&capability| has(capability));
    let list = |set: Vec<caps::Capability>| -> String {
        let names: Vec<String> = set.iter().map(ToString::to_string).collect();
        if names.is_empty() {
            "none".into()
        } else {
            names.join(" ")
        }
    };
    let processes = |name, count: ProcessCounts| {
        check(
            name,
            Some(count.reachable == count.total),
            format!(
                "{} of {} can be reached into; {} can be seen as owners",
                count.reachable, count.total, count.visible
            ),
        )
    };
    let mut checks = vec![
        check("kernel", None, format!("Linux {kernel}")),
        check("user", None, format!("uid {uid}")),
        check(
            "capabilities",
            // `auto` does not need CAP_SYS_ADMIN in its own namespace. Only other namespaces and reclaim do.
            Some(
                missing
                    .iter()
                    .all(|&lacks| lacks == Capability::CAP_SYS_ADMIN),
            ),
            match missing.is_empty() {
                true => list(held),
                false => format!("{}; missing: {}", list(held), list(missing)),
            },
        ),
        match &examination.trials.list_error {
            None => check("list of sockets", Some(true), String::new()),
            Some(why) => check("list of sockets", Some(false), why.clone()),
        },
        io_check("pidfd_getfd", pidfd_getfd),
        io_check("TCP_REPAIR", repair),
        io_check("raw socket IPv4", raw_v4),
        io_check("raw socket IPv6", raw_v6),
        io_check("packet socket", capture),
        match ptrace_scope {
            None => check("ptrace_scope", Some(true), "no yama".into()),
            Some(scope) => check(
                "ptrace_scope",
                Some(*scope == 0 || (*scope < 3 && has(Capability::CAP_SYS_PTRACE))),
                scope.to_string(),
            ),
        },
        match hidepid {
            None => check("hidepid", Some(true), "off".into()),
            Some(value) => check(
                "hidepid",
                Some(!examination.host.hides_others()),
                value.clone(),
            ),
        },
        check(
            "user namespace",
            None,
            format!(
                "{}; users {}",
                match first_user_namespace {
                    None => "unknown: /proc does not show it",
                    Some(true) => "the first",
                    Some(false) => {
                        "not the first: capabilities count only in namespaces made in it"
                    }
                },
                match user_namespaces_forbidden {
                    None => "may make their own".to_owned(),
                    Some(setting) => format!("may not make their own ({setting})"),
                }
            ),
        ),
        match namespaces {
            Ok(counts) => check(
                "network namespaces",
                Some(counts.enterable == counts.total && counts.unknown_processes == 0),
                format!(
                    "{} of {} can be entered; unknown for {}",
                    counts.enterable,
                    counts.total,
                    counted(counts.unknown_processes, "process")
                ),
            ),
            Err(error) => check("network namespaces", Some(false), error.clone()),
        },
    ];
    // A request over netlink would load conntrack where it is not.
    checks.push(match tracked {
        None | Some((0, _)) => check(
            "gateway",
            None,
            "conntrack tracks nothing in this network namespace: no forwarded connection is known".into(),
        ),
        Some((used, most)) => check(
            "gateway",
            Some(used < most && has(Capability::CAP_NET_ADMIN)),
            format!(
                "conntrack has {used} of {most} entries; the list needs CAP_NET_ADMIN, --probe and --cut CAP_NET_RAW too"
            ),
        ),
    });
    checks.extend(conntrack_events.map(events_check));
    match reachability {
        Ok(reach) => checks.extend([
            processes("this user's processes", reach.same_user),
            processes("others' processes", reach.others),
        ]),
        Err(error) => checks.push(check("processes", Some(false), error.clone())),
    }
    checks.push(match iterator {
        Ok(()) => check(
            "owners by iterator",
            Some(true),
            format!("used if the host has {MANY_FILES} open files or more"),
        ),
        // From /proc cwkill finds the same owners.
        Err(why) => check(
            "owners by iterator",
            None,
            format!("from /proc instead: {why}"),
        ),
    });
    let by_sock_destroy = |why: String| {
        check(
            "destroy by iterator",
            None,
            format!("by SOCK_DESTROY instead: {why}"),
        )
    };
    checks.extend(
        match (
            &examination.not_by_iterator,
            &examination.trials.by_iterator,
        ) {
            (Some(why), _) => Some(by_sock_destroy(why.clone())),
            (None, Some(TrialResult::Succeeded)) => Some(check(
                "destroy by iterator",
                Some(true),
                "each socket is judged and destroyed at one instant".into(),
            )),
            (None, Some(TrialResult::Failed(error))) => {
                Some(check("destroy by iterator", Some(false), error.to_string()))
            }
            (None, Some(TrialResult::NotRun(why))) => {
                Some(check("destroy by iterator", None, why.clone()))
            }
            // The sockets cannot be listed; another line says so.
            (None, None) => None,
        },
    );
    checks.push(trace_check(&examination.tracing));
    checks.push(match container_names {
        Ok(counts) => names_check(counts),
        Err(error) => check("container names", Some(false), error.clone()),
    });
    checks.extend(confinement_checks(examination));
    checks
}

/// Whether a watch of `cwkill gateway` hears of new connections.
fn events_check(sent: EventsSent) -> CheckLine {
    let why_none = sent.why_none();
    let detail = match (why_none, sent) {
        (Some(why), _) => format!(
            "conntrack sends none ({why}): --watch lists the table again and again, so more bytes pass"
        ),
        (None, EventsSent::WhileHeard) => {
            "conntrack sends them about entries that are made while somebody listens, as --watch does; it sees the others in the list \
             every 10 seconds"
                .to_owned()
        }
        (None, _) => "conntrack sends them about each entry".to_owned(),
    };
    CheckLine {
        name: "gateway events",
        ok: Some(why_none.is_none()),
        detail,
    }
}

/// Whether `cwkill trace` works.
fn trace_check(tracing: &Tracing) -> CheckLine {
    let (ok, detail) = match tracing {
        Tracing::Works(NotSeen { reads, accepts, .. }) => {
            let found = "the line of code that leaks is found";
            let detail = match (reads, accepts) {
                (None, None) => format!("{found}, and who accepted the connection"),
                (None, Some(why)) => format!("{found}, but not who accepted the connection: {why}"),
                (Some(why), None) => format!(
                    "it is found who opened the connection, but not the line of code that read the end: {why}"
                ),
                (Some(why), Some(_)) => format!(
                    "it is found who connected, but neither who accepted nor the line of code that read the end: {why}"
                ),
            };
            (Some(reads.is_none()), detail)
        }
        Tracing::Not(why) => (Some(false), why.clone()),
        Tracing::NotBuilt => (
            None,
            "this cwkill was built without the feature `trace`".to_owned(),
        ),
    };
    CheckLine {
        name: "trace",
        ok,
        detail,
    }
}

/// Of which containers the names are known.
fn names_check(counts: &ContainerNames) -> CheckLine {
    let of_runtime = |(runtime, counts): (&Runtime, &NameCounts)| {
        let why = counts.why.as_ref();
        let why = why.map_or_else(String::new, |why| format!(" ({why})"));
        format!("{runtime} {} of {}{why}", counts.named, counts.total)
    };
    let parts: Vec<String> = counts.iter().map(of_runtime).collect();
    CheckLine {
        name: "container names",
        ok: (!parts.is_empty()).then(|| counts.values().all(|one| one.named == one.total)),
        detail: match parts.is_empty() {
            true => "no container is running".to_owned(),
            false => escape(&parts.join(", ")),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_works_if_it_finds_the_line() {
        let detail = |reads: Option<&str>, accepts: Option<&str>| {
            let not_seen = NotSeen {
                reads: reads.map(str::to_owned),
                accepts: accepts.map(str::to_owned),
                later: false,
            };
            let line = trace_check(&Tracing::Works(not_seen));
            assert_eq!(line.ok, Some(reads.is_none()));
            line.detail
        };
        let line = "the line of code that leaks is found";
        assert_eq!(
            detail(None, None),
            format!("{line}, and who accepted the connection")
        );
        assert_eq!(
            detail(None, Some("why")),
            format!("{line}, but not who accepted the connection: why")
        );
        for accepts in [None, Some("why")] {
            let detail = detail(Some("because"), accepts);
            assert!(!detail.contains(line), "{detail}");
            assert!(detail.ends_with("the end: because"), "{detail}");
        }
    }

    #[test]
    fn only_without_events_a_watch_hears_nothing() {
        for (sent, is_heard, detail) in [
            (EventsSent::Unsupported, false, "CONFIG_NF_CONNTRACK_EVENTS"),
            (EventsSent::Never, false, "nf_conntrack_events is 0"),
            (EventsSent::Always, true, "each entry"),
            (EventsSent::WhileHeard, true, "while somebody listens"),
        ] {
            let line = events_check(sent);
            assert_eq!(line.ok, Some(is_heard), "{sent:?}");
            assert!(line.detail.contains(detail), "{}", line.detail);
        }
    }
}
