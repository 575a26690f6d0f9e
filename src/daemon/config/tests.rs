use std::fs;

use super::*;
use crate::cli::Selection;
use crate::model::Cause;
use crate::proc::cgroup::Cgroup;
use crate::proc::{Process, ProcessId};

/// A policy with these further lines.
fn policy(lines: &str) -> Result<Policy, ConfigError> {
    let text = format!("[[policy]]\nname = \"a\"\nmatch = {{ port = 8080 }}\n{lines}\n");
    let config = DaemonConfig::parse(&text)?;
    Ok(config.policies.into_iter().next().expect("a policy"))
}

/// The error of a configuration, which must contain each of `parts`.
fn refused(text: &str, parts: &[&str]) {
    let error = DaemonConfig::parse(text).expect_err(text).to_string();
    for part in parts {
        assert!(error.contains(part), "{text}\n{error}\nhas no {part}");
    }
}

fn process(comm: &str, cgroup: &str) -> Process {
    Process {
        id: ProcessId {
            pid: 7,
            start_time: 0,
        },
        comm: comm.into(),
        cgroup: Cgroup::parse(cgroup),
    }
}

#[test]
fn an_error_of_the_text_file_has_its_place() {
    let config =
        DaemonConfig::parse("[daemon]\ninterval = \"10s\"\ntextfile = \"/nowhere\"\n").unwrap();
    let error = config.textfile_error(&std::io::ErrorKind::NotFound.into());
    assert_eq!(
        error.to_string(),
        "daemon.toml:3:12: `textfile`: cannot use /nowhere: entity not found"
    );
}

#[test]
fn only_a_policy_that_acts_with_the_method_destroys() {
    let acting = "mode = \"act\"\nexpires = 2100-01-01\nmin_age = \"1m\"\n";
    let destroys = |lines: &str| {
        let text = format!("[[policy]]\nname = \"a\"\nmatch = {{ port = 8080 }}\n{lines}\n");
        DaemonConfig::parse(&text).unwrap().destroys()
    };
    assert!(destroys(acting));
    assert!(destroys(&format!("{acting}methods = [\"destroy\"]")));
    assert!(!destroys(&format!("{acting}methods = [\"shutdown\"]")));
    assert!(!destroys("methods = [\"destroy\"]"));
}

#[test]
fn without_policies_it_observes() {
    let config = DaemonConfig::parse("").unwrap();
    assert_eq!(config.interval, Duration::from_secs(30));
    assert_eq!(
        config.listen,
        Listen::Address("127.0.0.1:9979".parse().unwrap())
    );
    assert!(config.policies.is_empty() && !config.all_netns);
}

#[test]
fn everything_can_be_said() {
    let config = DaemonConfig::parse(
        r#"
[daemon]
interval = "10s"
listen = "unix:/run/cwkill/metrics.sock"
all_netns = true
textfile = "/var/lib/node"
host_root = "/host"
log_file = "/var/log/cwkill/acts.jsonl"

[limits]
kills_per_sweep = 50
kills_per_hour = 500

[protect]
units = ["postgresql"]
ports = [5432]
processes = ["pg*"]
users = ["root", 70]
remove = { ports = [22], units = ["docker.service"] }

[[policy]]
name = "tomcat-leak"
reason = "ticket 4711"
expires = 2027-01-31
mode = "act"
match = { port = "8080,9000-9100", process = ["java", "node"], cause = "drained", address_gone = true, netns = "web", expression = "dst 10.0.0.0/8" }
min_age = "10m"
min_idle = "1m"
confirm = 3
start_above = "50%"
stop_below = "30%"
methods = ["shutdown", "destroy"]
kills_per_sweep = 20
kills_per_hour = 100
share = "10%"
reclaim = true
window = ["22:00-06:00", "12:00-13:00 +02:00"]
breaker = { sweeps = 4, failures = "20%", surge = 5, restarts = 2, cooldown = "2h" }
"#,
    )
    .unwrap();
    assert_eq!(config.interval, Duration::from_secs(10));
    assert_eq!(
        config.listen,
        Listen::Unix("/run/cwkill/metrics.sock".into())
    );
    assert!(config.all_netns);
    assert_eq!(config.host_root, Path::new("/host"));
    assert_eq!(config.limits.kills_per_hour, 500);
    assert_eq!(config.protection.ports, [5432].into());
    assert_eq!(config.protection.users, [0, 70].into());
    assert!(
        !config
            .protection
            .units
            .contains(&"docker.service".to_owned())
    );
    let policy = &config.policies[0];
    assert_eq!((policy.mode, policy.confirm), (Mode::Act, 3));
    assert_eq!(policy.start_above, Some(Level::OfLimit(Percent(50))));
    assert_eq!(policy.methods.len(), 2);
    assert_eq!((policy.kills_per_sweep, policy.kills_per_hour), (20, 100));
    assert_eq!(policy.share, Percent(10));
    assert_eq!(policy.windows.len(), 2);
    assert_eq!(policy.breaker.cooldown, Duration::from_secs(7200));
    assert_eq!(policy.netns.as_deref(), Some("web"));
    let selectors = &policy.selectors;
    assert_eq!(selectors.ports, [8080..=8080, 9000..=9100]);
    assert_eq!(selectors.processes.len(), 2);
    assert_eq!(selectors.causes, [Cause::Drained].into());
    assert!(selectors.address_gone);
    assert_eq!(selectors.min_age, Duration::from_secs(600));
    assert_eq!(selectors.min_idle, Duration::from_secs(60));
    assert!(selectors.expression.says_more_than_states());
    assert_eq!(
        (policy.place.line, policy.file.as_path()),
        (22, Path::new("daemon.toml"))
    );
}

#[test]
fn every_selector_of_the_command_line_is_taken() {
    let command = <Selection as clap::Args>::augment_args(clap::Command::new("x"));
    for argument in command.get_arguments() {
        let Some(long) = argument.get_long() else {
            continue;
        };
        if ["min-age", "min-idle", "all-netns", "host-root", "bpf"].contains(&long) {
            continue;
        }
        let value = match argument.get_action().takes_values() {
            true => {
                let example = crate::cli::example_value(long).unwrap();
                format!("\"{}\"", example.trim_matches('\''))
            }
            false => "true".to_owned(),
        };
        let field = long.replace('-', "_");
        let text = format!("[[policy]]\nname = \"a\"\nmatch = {{ {field} = {value} }}\n");
        let config = DaemonConfig::parse(&text);
        assert!(config.is_ok(), "{text}: {config:?}");
    }
    for elsewhere in [
        "min_age = \"1m\"",
        "min_idle = \"1m\"",
        "all_netns = true",
        "host_root = \"/\"",
        "bpf = \"never\"",
    ] {
        let text = format!("[[policy]]\nname = \"a\"\nmatch = {{ {elsewhere} }}\n");
        refused(&text, &["daemon.toml:3:11: "]);
    }
}

#[test]
fn an_error_has_its_place_and_a_good_value() {
    let head = "[[policy]]\nname = \"a\"\n";
    for (text, parts) in [
        (
            "[daemon]\nintervall = \"1s\"",
            &["daemon.toml:2:1: ", "did you mean `interval`?"][..],
        ),
        (
            "[daemon]\ninterval = 30",
            &["daemon.toml:2:12: `interval`: ", "\"30s\""],
        ),
        (
            "[daemon]\nlisten = \"localhost\"",
            &["daemon.toml:2:10: ", "127.0.0.1:9979"],
        ),
        ("daemon = 3", &["daemon.toml:1:10: ", "[daemon]"]),
        (
            "[limits]\nkills_per_hour = 0",
            &[":2:18: ", "for example 100"],
        ),
        ("[damon]\n", &[":1:2: ", "did you mean `daemon`?"]),
        (
            "[protect]\nremove = { ports = [80] }",
            &[":2:20: ", "not one of the defaults"],
        ),
        (
            "[protect]\nremove = { units = [\"sshd\"] }",
            &["did you mean \"sshd.service\"?"],
        ),
        (
            "[protect]\nports = [\"ssh\"]",
            &[":2:9: ", "for example 22"],
        ),
        ("[daemon]\ninterval = ", &["daemon.toml:2:"]),
        (
            "[[policy]]\nmatch = { all = true }",
            &[":1:1: ", "`name` is missing"],
        ),
        (
            "[[policy]]\nname = \"a b\"\nmatch = { all = true }",
            &[":2:8: ", "\"tomcat-leak\""],
        ),
        (
            "[[policy]]\nname = \"a\"",
            &[":1:1: ", "match = { port = 8080 }"],
        ),
        (&format!("{head}match = {{}}"), &[":3:9: ", "all = true"]),
        (
            &format!("{head}match = {{ prot = 80 }}"),
            &[":3:11: ", "did you mean `port`?"],
        ),
        (
            &format!("{head}match = {{ port = \"80x\" }}"),
            &[":3:18: ", "`80x` is not a port"],
        ),
        (
            &format!("{head}match = {{ port = 1.5 }}"),
            &[":3:18: ", "port = \"8080\""],
        ),
        (
            &format!("{head}match = {{ all = false }}"),
            &[":3:17: ", "leave it out"],
        ),
        (
            &format!("{head}match = {{ cause = [\"drained\", \"x\"] }}"),
            &[":3:19: ", "not-accepted, unread"],
        ),
        (
            &format!("{head}match = {{ expression = \"sport = :8O80\" }}"),
            &[":3:24: ", "column 9"],
        ),
        (
            &format!("{head}match = {{ ipv4 = true, ipv6 = true }}"),
            &[":3:9: ", "ipv"],
        ),
        (
            &format!("{head}match = {{ port = 1 }}\nmethods = [\"auto\", \"rst\"]"),
            &[":4:11: ", "shutdown,destroy,rst"],
        ),
        (
            &format!("{head}match = {{ port = 1 }}\nmethods = \"kill\""),
            &[":4:11: ", "`kill` is not a method"],
        ),
        (
            &format!("{head}match = {{ port = 1 }}\nmode = \"kill\""),
            &[":4:8: ", "\"observe\" or \"act\""],
        ),
        (
            &format!("{head}match = {{ port = 1 }}\nmin-age = \"1m\""),
            &[":4:1: ", "did you mean `min_age`?"],
        ),
        (
            &format!("{head}match = {{ port = 1 }}\nbreaker = {{ surge = 1 }}"),
            &[":4:21: ", "at least 2"],
        ),
        (
            &format!("{head}match = {{ port = 1 }}\nstop_below = 3"),
            &[":4:14: ", "`start_above` is missing"],
        ),
    ] {
        refused(text, parts);
    }
}

#[test]
fn the_command_line_can_keep_every_policy_from_acting() {
    let text = "[[policy]]\nname = \"a\"\nmatch = { port = 1 }\nmode = \"act\"\nexpires = 2027-01-31\nmin_age = \"1m\"\n\
                [[policy]]\nname = \"b\"\nmatch = { port = 2 }\n";
    let mut config = DaemonConfig::parse(text).unwrap();
    assert!(config.acts());
    config.observe();
    assert!(!config.acts());
    assert_eq!(config.kept_from_acting, ["a"]);
    let said = config.sentences(SystemTime::UNIX_EPOCH, &[]);
    let line = "--observe keeps policy a from acting";
    assert!(said.iter().any(|said| said == line), "{said:?}");
    let observes = said
        .iter()
        .filter(|said| said.ends_with("observes, and closes nothing"));
    assert_eq!(observes.count(), 2, "{said:?}");
}

#[test]
fn a_policy_that_acts_says_until_when_and_how_long_it_waits() {
    let complete = "mode = \"act\"\nexpires = 2027-01-31\nmin_age = \"1m\"";
    assert_eq!(policy(complete).unwrap().mode, Mode::Act);
    assert!(policy("mode = \"act\"\nexpires = 2027-01-31\nmin_idle = \"60s\"").is_ok());
    for (lines, part) in [
        ("mode = \"act\"\nmin_age = \"1m\"", "expires = 2027-01-31"),
        ("mode = \"act\"\nexpires = 2027-01-31", "min_age = \"10m\""),
        (
            "mode = \"act\"\nexpires = 2027-01-31\nmin_age = \"59s\"\nmin_idle = \"59s\"",
            "a minute or more",
        ),
    ] {
        let error = policy(lines).expect_err(lines).to_string();
        assert!(error.contains(part) && error.contains(":4:8: "), "{error}");
    }
    let narrow = format!("[[policy]]\nname = \"a\"\nmatch = {{ cause = \"drained\" }}\n{complete}");
    refused(&narrow, &["only narrows", "all = true"]);
    let all = narrow.replace("cause", "all = true, cause");
    assert!(DaemonConfig::parse(&all).is_ok());
    let observes = "[[policy]]\nname = \"a\"\nmatch = { cause = \"drained\" }";
    assert!(DaemonConfig::parse(observes).is_ok(), "it only observes");
}

#[test]
fn levels_agree() {
    for (lines, part) in [
        ("start_above = 3\nstop_below = 5", "stop before it starts"),
        ("start_above = 3\nstop_below = \"5%\"", "in the same way"),
    ] {
        let error = policy(lines).expect_err(lines).to_string();
        assert!(error.contains(part), "{error}");
    }
    assert!(policy("start_above = 3\nstop_below = 3").is_ok());
}

#[test]
fn protection_is_taken_out_by_name_only() {
    let protection = |text: &str| DaemonConfig::parse(text).unwrap().protection;
    let default = Protection::default();
    let sshd = process("sshd", "0::/system.slice/ssh.service\n");
    let session = process("sshd-session", "0::/user.slice/session-1.scope\n");
    let java = process("java", "0::/system.slice/tomcat.service\n");
    assert_eq!(default.of(22, 0, [&java]), Some(Protected::Port));
    assert_eq!(default.of(80, 0, [&java, &sshd]), Some(Protected::Unit));
    assert_eq!(default.of(80, 0, [&session]), Some(Protected::Process));
    assert_eq!(default.of(80, 0, [&java]), None);
    assert_eq!(default.of(80, 0, []), None);

    let more = protection("[protect]\nunits = [\"tomcat\"]\nusers = 33");
    assert_eq!(more.of(80, 0, [&java]), Some(Protected::Unit));
    assert_eq!(more.of(80, 33, []), Some(Protected::User));
    assert_eq!(
        more.of(22, 0, []),
        Some(Protected::Port),
        "the defaults stay"
    );

    let less = protection(
        "[protect.remove]\nports = [22]\nunits = [\"ssh.service\"]\nprocesses = [\"sshd\"]",
    );
    assert_eq!(less.of(22, 0, [&sshd]), None);
    assert_eq!(less.of(22, 0, [&session]), Some(Protected::Process));
}

#[test]
fn a_window_can_span_midnight() {
    let at = |minutes: u64| SystemTime::UNIX_EPOCH + Duration::from_secs(86_400 + minutes * 60);
    let window = |text: &str| {
        policy(&format!("window = \"{text}\""))
            .unwrap()
            .windows
            .remove(0)
    };
    let night = window("22:00-06:00");
    for (minutes, expected) in [
        (0, true),
        (359, true),
        (360, false),
        (1319, false),
        (1320, true),
    ] {
        assert_eq!(night.contains(at(minutes)), expected, "{minutes}");
    }
    let noon = window("12:00-13:00 +02:00");
    for (minutes, expected) in [
        (599, false),
        (600, true),
        (659, true),
        (660, false),
        (720, false),
    ] {
        assert_eq!(noon.contains(at(minutes)), expected, "{minutes}");
    }
    assert!(window("00:00-24:00").contains(at(1439)));
    assert!(!night.contains(SystemTime::UNIX_EPOCH - Duration::from_secs(60)));
}

#[test]
fn a_policy_that_changed_has_another_fingerprint() {
    let fingerprint = |lines: &str| policy(lines).unwrap().fingerprint;
    let first = fingerprint("");
    assert_eq!(first, fingerprint("# a comment\nreason = \"because\"\n"));
    for changed in [
        "confirm = 3",
        "share = \"51%\"",
        "methods = \"destroy\"",
        "window = \"01:00-02:00\"",
        "min_age = \"1s\"",
    ] {
        assert_ne!(first, fingerprint(changed), "{changed}");
    }
}

#[test]
fn parts_are_never_nothing() {
    assert_eq!(Percent(1).of(1), 1);
    assert_eq!(Percent(50).of(3), 2);
    assert_eq!(Percent(100).of(7), 7);
    assert_eq!(Percent(50).of(0), 0);
    assert_eq!(Level::OfLimit(Percent(50)).sockets(Some(1024)), Some(512));
    assert_eq!(Level::OfLimit(Percent(50)).sockets(None), None);
    assert_eq!(Level::Sockets(5).sockets(None), Some(5));
}

#[test]
fn files_are_read_in_order() {
    let directory = tempfile::tempdir().unwrap();
    let main = directory.path().join("daemon.toml");
    let one = |name: &str| format!("[[policy]]\nname = \"{name}\"\nmatch = {{ all = true }}\n");
    let error = DaemonConfig::load(Some(&main)).unwrap_err().to_string();
    assert!(
        error.starts_with("cannot read /") && error.contains("daemon.toml"),
        "{error}"
    );

    fs::write(
        &main,
        format!("[daemon]\ninterval = \"5s\"\n{}", one("main")),
    )
    .unwrap();
    let beside = directory.path().join("daemon.d");
    fs::create_dir(&beside).unwrap();
    fs::write(beside.join("20-b.toml"), one("b")).unwrap();
    fs::write(
        beside.join("10-a.toml"),
        format!("[daemon]\ninterval = \"6s\"\n{}", one("a")),
    )
    .unwrap();
    fs::write(beside.join("30-c.toml.dpkg-old"), "nonsense").unwrap();
    fs::write(beside.join(".hidden.toml"), "nonsense").unwrap();
    let config = DaemonConfig::load(Some(&main)).unwrap();
    let names: Vec<&str> = config.policies.iter().map(|it| it.name.as_str()).collect();
    assert_eq!(names, ["main", "a", "b"]);
    assert_eq!(
        config.interval,
        Duration::from_secs(6),
        "the later file wins"
    );
    assert_eq!(config.files.len(), 3);

    fs::write(beside.join("15-x.toml"), one("main")).unwrap();
    let error = DaemonConfig::load(Some(&main)).unwrap_err().to_string();
    assert!(
        error.contains("15-x.toml:2:8: ") && error.contains("daemon.toml:4:8"),
        "{error}"
    );

    fs::create_dir(beside.join("00.toml")).unwrap();
    let error = DaemonConfig::load(Some(&main)).unwrap_err().to_string();
    assert!(
        error.contains("00.toml") && error.contains("regular file"),
        "{error}"
    );
}
