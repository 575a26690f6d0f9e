//! The command line: bad input, help, and the documents that describe the options.

use anyhow::{Context, Result};
use clap::CommandFactory;
use netns_harness::{Family, Lab};

use crate::support::{CWKILL, connections, cwkill, lab, ran};
use crate::trial::{Test, once};

pub const TESTS: &[Test] = &[
    once!(no_word_of_the_command_line_moves_the_cursor),
    once!(bad_values_are_named_and_nothing_is_done),
    once!(every_option_has_a_paragraph_in_the_man_page),
    once!(a_mention_is_not_a_paragraph),
    once!(closed_output_is_not_an_error),
    once!(options_named_in_the_readme_exist),
    once!(nothing_is_a_success_if_it_may_be),
    once!(a_short_help_is_short_and_a_long_one_has_all),
];

/// A bad command line, the part of it that the error must name, and the good value that the error must suggest.
const BAD: &[(&str, &str, &str)] = &[
    ("--port 80x", "80x", "8080"),
    ("--port 0", "`0`", "8080"),
    ("--port 70000", "70000", "8080"),
    ("--port 9000-8000", "9000-8000", "8000-9000"),
    ("--port ,", "--port", "8080"),
    ("8080", "`8080`", "--port 8080"),
    (":8080", "`:8080`", "--port 8080"),
    ("list", "`list`", "without a command lists"),
    ("kill --port 8080", "`kill`", "cwkill --port 8080"),
    ("diagnos", "`diagnos`", "cwkill diagnose"),
    ("--all --force", "--force", "--discard-unsent"),
    ("--state last-ack --method destroy", "--state", "--all"),
    ("--min-age 1h --reclaim", "--min-age", "--port 8080"),
    ("--port 8080,80x", "`80x`", "8080"),
    ("--state close-wait,shut", "`shut`", "last-ack"),
    ("--all --method shutdown,kill", "`kill`", "destroy"),
    ("--peer-port no-such-service", "no-such-service", "8080"),
    ("--local 10.0.0", "10.0.0", "192.0.2.0/24"),
    ("--peer 10.0.0.0/33", "10.0.0.0/33", "192.0.2.0/24"),
    ("--container a[", "`a[`", "my-leaky-app"),
    ("--pod shop/", "`shop/`", "shop/web-*"),
    ("--pod a/b/c", "`a/b/c`", "shop/web-*"),
    ("--namespace shop/web", "`shop/web`", "--pod"),
    ("--compose-service a[", "`a[`", "worker*"),
    ("--pid java", "java", "4711"),
    ("--pid 0", "'0'", "4711"),
    ("--process [", "[", "php-fpm*"),
    ("--user no-such-user-here", "no-such-user-here", "www-data"),
    ("--state closed-wait", "closed-wait", "close-wait"),
    ("--min-age 90", "90", "90s"),
    ("--min-age soon", "soon", "90s"),
    ("--cause leak", "leak", "drained"),
    ("--all --method kill", "kill", "shutdown"),
    ("--all --grace=-1s", "-1s", "90s"),
    ("--all --max-kills 0", "'0'", "--dry-run"),
    ("--all --max-kills many", "many", "number"),
    ("--method destroy", "--method", "--port 8080"),
    ("-y", "--yes", "--port 8080"),
    ("--max-kills 3", "--max-kills", "--all"),
    ("--all --log syslog", "syslog", "journald"),
    ("--log-file /tmp/x", "--log-file", "--port 8080"),
    ("--frobnicate", "--frobnicate", "--help"),
    ("--port", "--port", "--port 8080"),
    ("--pid -1", "`-1`", "--pid 4711"),
    ("--min-age -10s", "`-10s`", "--min-age 10m"),
    ("--all=yes", "--all", "takes no value"),
    ("--prot 80", "--prot", "--port"),
    ("diagnose --quiet", "--quiet", "`cwkill reclaim`"),
    ("diagnose 99999", "`99999`", "--pid 99999"),
    ("java", "`java`", "--process java"),
    ("nginx.service", "`nginx.service`", "--unit nginx.service"),
    ("192.0.2.1", "`192.0.2.1`", "--peer 192.0.2.1"),
    ("--port=", "an empty value", "8080"),
    ("--netns=", "--netns", "4711"),
    ("doctor x", "`x`", "cwkill doctor --help"),
    ("--all -4 -6", "--ipv6", "--help"),
    ("--all --json --jsonl", "--jsonl", "--help"),
    ("--color blue", "blue", "never"),
    ("--watch-refill 10s", "--watch-refill", "--port 8080"),
    ("--all --watch-refill 0s", "0s", "10s"),
    ("--all --watch-refill soon", "soon", "90s"),
    ("--all -n --watch-refill 10s", "--watch-refill", "--help"),
    ("--all -q --watch-refill 10s", "--watch-refill", "--help"),
    ("diagnose --sample 0s", "0s", "100ms"),
    ("diagnose --port 80x", "80x", "8080"),
    ("diagnose --method destroy", "--method", "--help"),
    ("diagnose --jsonl", "--jsonl", "--help"),
    ("diagnose sport = :8O80", "column 9", ":8080"),
    ("--reclaim", "--reclaim", "--port 8080"),
    ("--all --reclaim-age 5s", "--reclaim-age", "cwkill reclaim"),
    ("--all --reclaim --stop-limit 0s", "0s", "100ms"),
    ("--all --reclaim --no-owners", "--no-owners", "--help"),
    ("reclaim --pid java", "java", "4711"),
    ("reclaim --reclaim-force", "--reclaim-force", "--pid 4711"),
    ("reclaim --reclaim-age soon", "soon", "90s"),
    ("reclaim --peer-port 8080", "--peer-port", "--help"),
    ("reclaim 4711", "4711", "--help"),
    ("gateway --mark 7/8/9", "`7/8/9`", "0x10/0xf0"),
    ("gateway --zone x", "`x`", "7"),
    ("gateway --conntrack-state shut", "`shut`", "close-wait"),
    ("gateway --host 10.0.0", "10.0.0", "192.0.2.0/24"),
    ("gateway --pid 4711", "--pid", "--help"),
    ("gateway 443", "`443`", "--dport 443"),
    ("gateway 192.0.2.1", "`192.0.2.1`", "--host 192.0.2.1"),
    ("gateway state established", "`state`", "--conntrack-state"),
    ("--all --host 192.0.2.1", "--host", "cwkill gateway"),
    (
        "--port 1 diagnose",
        "`diagnose` is a command",
        "`cwkill diagnose --port 1`",
    ),
    (
        "-N 1 diagnose --sample 1s",
        "`diagnose` is a command",
        "`cwkill diagnose -N 1 --sample 1s`",
    ),
    (
        "--port 1 reclaim",
        "`reclaim` is a command",
        "`cwkill reclaim --port 1`",
    ),
    ("dst diagnose", "`diagnose` is not an address", "10.0.0.0/8"),
];

fn bad_values_are_named_and_nothing_is_done() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 1)?;
    let before = lab.app_host().ss(&[])?;
    for (line, named, good) in BAD {
        let ran = cwkill(&lab, line)?.exits(2);
        assert!(ran.stdout.is_empty(), "{line}: {ran:?}");
        let has = |text: &str| ran.stderr.contains(text);
        assert!(
            has(named) && has(good),
            "{line}: wanted {named} and {good}: {ran:?}"
        );
    }
    assert_eq!(lab.app_host().ss(&[])?, before);
    Ok(())
}

fn nothing_is_a_success_if_it_may_be() -> Result<()> {
    let lab = Lab::new()?;
    for line in [
        "--port 9",
        "--port 9 -q",
        "--port 9 -n",
        "--port 9 --json",
        "",
        "diagnose --sample 1ms --port 9",
        "reclaim -n --process no-such-process",
        "reclaim --process no-such-process",
    ] {
        cwkill(&lab, line)?.exits(1);
        cwkill(&lab, &format!("{line} --ok-if-none"))?.exits(0);
    }
    // What could not be looked at is still no success.
    let none = lab.app_host().command(CWKILL).capabilities(&[]);
    ran(none.args(["--all-netns", "--port", "9", "--ok-if-none"]))?.exits(4);
    cwkill(&lab, "-N no-such-namespace --ok-if-none")?.exits(3);
    cwkill(&lab, "--port 80x --ok-if-none")?.exits(2);
    Ok(())
}

fn a_short_help_is_short_and_a_long_one_has_all() -> Result<()> {
    let lab = Lab::new()?;
    let mut cli = cwkill::cli::Cli::command();
    cli.build();
    let commands = [
        "diagnose",
        "trace",
        "check",
        "doctor",
        "reclaim",
        "daemon",
        "gateway",
        "completions",
    ];
    for name in [""].into_iter().chain(commands) {
        let command = match name {
            "" => &cli,
            _ => cli.find_subcommand(name).context("no such command")?,
        };
        let help = |option: &str| -> Result<String> {
            let ran = cwkill(&lab, format!("{name} {option}").trim())?.exits(0);
            assert!(ran.stderr.is_empty(), "{ran:?}");
            Ok(ran.stdout)
        };
        let (short, long) = (help("-h")?, help("--help")?);
        assert!(short.lines().count() <= 45, "{name} -h is long:\n{short}");
        // On a terminal of the usual width as well.
        let line = format!("{name} -h");
        let narrow = lab.app_host().command(CWKILL).env("COLUMNS", "80");
        let narrow = ran(narrow.args(line.split_whitespace()))?;
        assert!(
            narrow.stdout.lines().count() <= 45,
            "{name} -h is long:\n{}",
            narrow.stdout
        );
        for option in options(command) {
            let has = |text: &str| {
                let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-'));
                words.into_iter().any(|word| word == option)
            };
            assert!(has(&long), "{name} --help lacks {option}:\n{long}");
        }
        for line in short.lines().chain(long.lines()) {
            assert!(line.chars().count() <= 110, "{name}: {line}");
        }
        if !["doctor", "completions"].contains(&name) {
            assert!(short.lines().count() < long.lines().count(), "{name}");
            assert!(long.contains("Examples:"), "{name}:\n{long}");
            assert!(long.contains("Exit status: "), "{name}:\n{long}");
            assert!(short.contains("--help"), "{name}:\n{short}");
        }
    }
    Ok(())
}

pub fn document(name: &str) -> Result<String> {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    std::fs::read_to_string(&path).with_context(|| path.display().to_string())
}

pub fn options(command: &clap::Command) -> Vec<String> {
    let mut options = Vec::new();
    for argument in command.get_arguments() {
        options.extend(argument.get_short().map(|short| format!("-{short}")));
        let longs = argument.get_long_and_visible_aliases().unwrap_or_default();
        options.extend(longs.into_iter().map(|long| format!("--{long}")));
    }
    options
}

/// The tags of the paragraphs of a man page.
fn tags(page: &str) -> std::collections::HashSet<String> {
    let lines: Vec<&str> = page.lines().collect();
    let tag = |pair: &[&str]| (pair[0] == ".TP").then(|| pair[1].to_owned());
    // roff writes a dash as `\-`; a word ends at anything that cannot be part of an option.
    lines
        .windows(2)
        .filter_map(tag)
        .flat_map(|line| {
            let line = line
                .replace("\\-", "-")
                .replace("\\fP", " ")
                .replace("\\fR", " ");
            let words = line.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-'));
            words.map(str::to_owned).collect::<Vec<_>>()
        })
        .collect()
}

fn every_option_has_a_paragraph_in_the_man_page() -> Result<()> {
    let mut command = cwkill::cli::Cli::command();
    command.build();
    let main = tags(&document("man/cwkill.8")?);
    let known = options(&command);
    assert!(
        known.len() > 20,
        "the walk over the options found {known:?}"
    );
    for option in &known {
        assert!(
            main.contains(option),
            "{option} has no paragraph in man/cwkill.8"
        );
    }
    // Each command has a page of its own, which sends the reader to cwkill(8) for the selectors.
    for command in command.get_subcommands() {
        // A command without options of its own is described in cwkill(8).
        if options(command).iter().all(|option| known.contains(option)) {
            continue;
        }
        let name = format!("man/cwkill-{}.8", command.get_name());
        let own = tags(&document(&name)?);
        for option in options(command) {
            assert!(
                own.contains(&option) || known.contains(&option),
                "{option} has no paragraph in {name}"
            );
        }
    }
    Ok(())
}

/// Shows that the test above can fail.
fn a_mention_is_not_a_paragraph() -> Result<()> {
    let page = ".TP\n.BI \\-\\-port \" LIST\"\nPorts; see\n.B \\-\\-all .\n.TP\n.BR \\-n \", \" \\-\\-dry\\-run\nx";
    let tags = tags(page);
    for option in ["--port", "-n", "--dry-run"] {
        assert!(tags.contains(option), "{option}: {tags:?}");
    }
    assert!(
        !tags.contains("--all"),
        "a mention is not a paragraph: {tags:?}"
    );
    Ok(())
}

fn options_named_in_the_readme_exist() -> Result<()> {
    let text = document("README.md")?;
    let mut command = cwkill::cli::Cli::command();
    command.build();
    let mut known = options(&command);
    known.extend(command.get_subcommands().flat_map(options));
    let commands = text.lines().filter(|line| {
        let line = line.trim_start();
        line.strip_prefix("sudo ")
            .unwrap_or(line)
            .starts_with("cwkill ")
    });
    for line in commands {
        let code = line.split(" #").next().unwrap_or_default();
        for word in code
            .split_whitespace()
            .filter(|word| word.starts_with("--"))
        {
            let option = word.split('=').next().unwrap_or_default().to_owned();
            assert!(
                known.contains(&option),
                "README names {option}, which is not an option"
            );
        }
    }
    Ok(())
}

/// If the output cannot be written, the work is still done and the status says so.
fn closed_output_is_not_an_error() -> Result<()> {
    for output in ["", "--json", "--jsonl", "-v"] {
        let (lab, _leak) = lab("unread", Family::V4, 3)?;
        let (reader, writer) = std::io::pipe()?;
        drop(reader);
        let line = format!("--all {output}");
        let child = lab.app_host().command(CWKILL).args(line.split_whitespace());
        let status = child
            .stdout(writer)
            .stderr(std::process::Stdio::null())
            .spawn()?
            .wait()?;
        assert_eq!(status.code(), Some(0), "{line}");
        assert_eq!(connections(&lab)?.len(), 0);
    }
    // Errors and listings cannot be written either.
    let empty = Lab::new()?;
    for (script, code) in [
        ("--port 80x >&- 2>&-", 2),
        ("-N no-such-namespace >/dev/full 2>/dev/full", 3),
        (">/dev/full 2>/dev/full", 3),
    ] {
        let script = format!("{CWKILL} {script}");
        ran(empty.app_host().command("sh").args(["-c", &script]))?.exits(code);
    }
    let (lab, _leak) = lab("unread", Family::V4, 3)?;
    let script = format!("{CWKILL} --all >/dev/full");
    let ran = ran(lab.app_host().command("sh").args(["-c", &script]))?.exits(3);
    ran.complains("the work is done (3 sockets matched: 3 closed)")
        .complains("descriptors of closed");
    assert_eq!(connections(&lab)?.len(), 0);
    Ok(())
}

/// A command line may come from another program, and quote a name that an attacker has chosen.
fn no_word_of_the_command_line_moves_the_cursor() -> Result<()> {
    let lab = Lab::new()?;
    let hostile = "/nowhere/x\x1b[2J\r\u{9b}A\u{202e}y\x07\nFORGED";
    for words in [
        &["-N", hostile][..],
        &["--netns", &hostile[1..]],
        &["--port", hostile],
        &["--all", "--log-file", hostile],
        &["--user", hostile],
        &["--cgroup", &hostile[1..]],
        &[hostile],
        &[&format!("--{hostile}")],
        &["--all", "-n", &format!("cgroup = {hostile}")],
        &["--all", hostile, "check"],
        &["diagnose", "-N", hostile],
        &["check", "-w", "1", "-c", "2", "-N", hostile],
        &["check", "-w", hostile],
        &["reclaim", "--pid", hostile],
        &["doctor", hostile],
    ] {
        let ran = ran(lab.app_host().command(CWKILL).args(words))?;
        assert!(matches!(ran.code, Some(2 | 3)), "{ran:?}");
        let said = format!("{}{}", ran.stdout, ran.stderr);
        let is_unsafe = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
        assert!(!said.contains(is_unsafe), "{words:?}: {said:?}");
        let is_forged = said.lines().any(|line| line.starts_with("FORGED"));
        assert!(!is_forged, "{words:?}: {said}");
    }
    Ok(())
}
