//! The diagnosis for programs: `schema_version` 1 of its own. Fields are added, never renamed.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::net::IpAddr;
use std::time::Duration;

use serde::Serialize;

use crate::diagnose::counts::{AGES, CauseCount, SocketCounts};
use crate::diagnose::pairing::{EndOwner, OtherEnd, OtherLeg};
use crate::diagnose::suggest::{LanguageRuntime, Suggestion};
use crate::diagnose::verdict::{self, Circumstance, Verdict};
use crate::diagnose::{Diagnosis, ListenerDiagnosis, ProcessDiagnosis};
use crate::model::{Cause, TimeAndPlace};
use crate::report::serialize::{
    JsonAbsentOwner, JsonContainer, JsonTimeAndPlace, JsonTracked, container, json_absent_owners,
    json_time_and_place, json_tracked, serializer,
};
use crate::tcp::TcpState;

const SCHEMA_VERSION: u32 = 1;
/// The maximum number of ports, and of peers, in a list.
const MAX_LISTED: usize = 20;

/// Writes one document.
pub fn write(
    diagnosis: &Diagnosis,
    time_and_place: &TimeAndPlace,
    out: &mut dyn Write,
) -> io::Result<()> {
    let elapsed = diagnosis.elapsed;
    let coverage = &diagnosis.scan.coverage;
    let all = |healthy: bool| {
        let processes = diagnosis.processes.iter();
        let wanted = processes.filter(|process| process.is_healthy() == healthy);
        wanted.map(|one| process(one, elapsed)).collect()
    };
    let document = DiagnosisDocument {
        schema_version: SCHEMA_VERSION,
        cwkill_version: env!("CARGO_PKG_VERSION"),
        time_and_place: json_time_and_place(time_and_place),
        sample_seconds: elapsed.as_secs_f64(),
        total: counts(&diagnosis.total, elapsed, Circumstance::None),
        processes: all(false),
        healthy_processes: all(true),
        listeners: diagnosis
            .listeners
            .iter()
            .map(|l| listener(diagnosis, l))
            .collect(),
        unknown_owner: diagnosis
            .ownerless
            .as_ref()
            .map(|it| counts(it, elapsed, Circumstance::None)),
        unreadable_processes: diagnosis
            .unreadable_processes
            .max(coverage.unreadable_processes),
        hidden_processes: coverage.hidden_processes || diagnosis.hidden_processes,
        unknown_descriptors: diagnosis.unknown_descriptors,
        unreachable_namespaces: coverage.unreachable_namespaces,
        processes_in_unknown_namespace: coverage.unknown_namespaces,
        possible_matches: coverage.undecided,
        unnamed_containers: coverage.unnamed.containers,
        mptcp_subflows_in_unknown_state: coverage.unlisted_subflows,
        namespaces_not_looked_into: coverage.namespaces_not_looked_into,
        sockets_not_looked_into: coverage.sockets_not_looked_into,
        absent_owners: json_absent_owners(&coverage.absent_owners),
        younger: diagnosis.scan.younger,
        in_use: diagnosis.scan.in_use,
        host_at_file_limit: diagnosis.is_host_at_limit,
        descriptors_not_searched: coverage.unexamined_descriptors,
        sockets_in_unknown_namespace: coverage.unplaced_sockets,
        conntrack_close_wait: coverage.tracked.map(json_tracked),
    };
    document.serialize(&mut serializer(&mut *out))?;
    out.write_all(b"\n")
}

#[derive(Serialize)]
struct DiagnosisDocument<'a> {
    schema_version: u32,
    cwkill_version: &'static str,
    #[serde(flatten)]
    time_and_place: JsonTimeAndPlace<'a>,
    sample_seconds: f64,
    total: JsonCounts,
    processes: Vec<JsonProcess<'a>>,
    /// Those that the operator names by their pids, and that leak nothing.
    healthy_processes: Vec<JsonProcess<'a>>,
    listeners: Vec<JsonDiagnosedListener>,
    unknown_owner: Option<JsonCounts>,
    unreadable_processes: usize,
    hidden_processes: bool,
    unknown_descriptors: usize,
    unreachable_namespaces: usize,
    processes_in_unknown_namespace: usize,
    possible_matches: usize,
    /// Containers that may be selected, and whose names could not be read.
    unnamed_containers: usize,
    mptcp_subflows_in_unknown_state: usize,
    namespaces_not_looked_into: usize,
    /// All their TCP sockets; `None`: not known of each namespace.
    sockets_not_looked_into: Option<usize>,
    absent_owners: Vec<JsonAbsentOwner>,
    /// They match, but are younger than `--min-age`.
    younger: usize,
    /// They match, but data has moved in them within `--min-idle`.
    in_use: usize,
    host_at_file_limit: bool,
    descriptors_not_searched: usize,
    sockets_in_unknown_namespace: usize,
    /// `None`: there are none, or cwkill did not look.
    conntrack_close_wait: Option<JsonTracked>,
}

#[derive(Serialize)]
struct JsonCounts {
    stuck: usize,
    causes: BTreeMap<&'static str, JsonCause>,
    oldest_ms: Option<u64>,
    ages: Vec<JsonAge>,
    growth: JsonGrowth,
    ports: Vec<JsonPort>,
    peers: Vec<JsonPeer>,
    peer_ports: Vec<JsonPort>,
    /// `None` if none was found in the namespaces that were read.
    other_end: Option<Vec<JsonOtherEnd>>,
}

#[derive(Serialize)]
struct JsonOtherEnd {
    pid: Option<i32>,
    comm: Option<String>,
    fd: Option<i32>,
    /// Its process has closed it.
    orphan: bool,
    state: &'static str,
    known_by: &'static str,
    count: usize,
}

#[derive(Serialize)]
struct JsonOtherLeg {
    address: IpAddr,
    port: u16,
    state: &'static str,
    count: usize,
    send_q: u64,
}

#[derive(Serialize)]
struct JsonCause {
    count: usize,
    idle: usize,
    verdict: String,
    verdict_code: &'static str,
}

#[derive(Serialize)]
struct JsonAge {
    /// `None`: no limit.
    under_seconds: Option<u64>,
    count: usize,
}

#[derive(Serialize)]
struct JsonGrowth {
    new: usize,
    gone: usize,
    per_minute: f64,
}

#[derive(Serialize)]
struct JsonPort {
    port: u16,
    count: usize,
}

#[derive(Serialize)]
struct JsonPeer {
    address: IpAddr,
    count: usize,
}

#[derive(Serialize)]
struct JsonProcess<'a> {
    pid: i32,
    parent: Option<i32>,
    comm: &'a str,
    unit: Option<&'a str>,
    container: Option<JsonContainer<'a>>,
    executable: Option<&'a str>,
    runtime: Option<&'static str>,
    state: Option<char>,
    condition: Option<&'static str>,
    uninterruptible_threads: &'a [i32],
    #[serde(flatten)]
    held: JsonCounts,
    shared: usize,
    waiting: usize,
    other_leg: Option<Vec<JsonOtherLeg>>,
    inherited_from: Option<JsonProcessName<'a>>,
    process_per_connection: bool,
    descriptors: JsonDescriptorCounts,
    next: Option<JsonSuggestion<'a>>,
    then: Option<JsonSuggestion<'a>>,
    trace: Option<JsonSuggestion<'a>>,
}

#[derive(Serialize)]
struct JsonProcessName<'a> {
    pid: i32,
    comm: &'a str,
}

#[derive(Serialize)]
struct JsonDescriptorCounts {
    used: Option<usize>,
    limit: Option<u64>,
    at_limit: bool,
    dead: Option<usize>,
    never_connected: Option<usize>,
    unknown: Option<usize>,
}

#[derive(Serialize)]
struct JsonSuggestion<'a> {
    command: &'a str,
    remark: &'a str,
}

#[derive(Serialize)]
struct JsonDiagnosedListener {
    address: IpAddr,
    port: u16,
    backlog: u32,
    waiting: u32,
    owners: Vec<i32>,
    /// The number of listening sockets at this address; more than one only with SO_REUSEPORT.
    group_size: usize,
    /// The number of those at which the connections may wait; several if the kernel does not tell at which.
    possible_sockets: usize,
    /// Connections waited at both scans, and none was accepted in between.
    stalled: bool,
    #[serde(flatten)]
    counts: JsonCounts,
}

fn counts(counts: &SocketCounts, elapsed: Duration, circumstance: Circumstance<'_>) -> JsonCounts {
    let cause = |(cause, sockets): (&Cause, &CauseCount)| {
        let json = JsonCause {
            count: sockets.count,
            idle: sockets.idle,
            verdict: verdict::cause_verdict(*cause, sockets, circumstance),
            verdict_code: Verdict::of(*cause, sockets, circumstance).code(),
        };
        (cause.name(), json)
    };
    let age = |((limit, _), count): (&(Duration, &str), usize)| JsonAge {
        under_seconds: (*limit != Duration::MAX).then_some(limit.as_secs()),
        count,
    };
    let ports = |ports: &[(u16, usize)]| {
        let listed = ports.iter().take(MAX_LISTED);
        let port = |&(port, count): &(u16, usize)| JsonPort { port, count };
        listed.map(port).collect()
    };
    let peers = counts.peers.iter().take(MAX_LISTED);
    JsonCounts {
        stuck: counts.stuck,
        causes: counts.causes.iter().map(cause).collect(),
        oldest_ms: counts
            .oldest
            .map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX)),
        ages: AGES.iter().zip(counts.ages).map(age).collect(),
        growth: JsonGrowth {
            new: counts.new,
            gone: counts.gone,
            per_minute: counts.growth_per_minute(elapsed),
        },
        ports: ports(&counts.ports),
        peer_ports: ports(&counts.peer_ports),
        peers: peers
            .map(|&(address, count)| JsonPeer { address, count })
            .collect(),
        other_end: (!counts.other_ends.is_empty()).then(|| {
            counts
                .other_ends
                .iter()
                .take(MAX_LISTED)
                .map(other_end)
                .collect()
        }),
    }
}

fn other_end(end: &OtherEnd) -> JsonOtherEnd {
    let (pid, comm, fd) = match &end.owner {
        EndOwner::Process { pid, comm, fd } => (Some(*pid), Some(comm.clone()), *fd),
        EndOwner::Unknown | EndOwner::Orphan => (None, None, None),
    };
    JsonOtherEnd {
        pid,
        comm,
        fd,
        orphan: end.owner == EndOwner::Orphan,
        state: end.state.name(),
        known_by: end.known_by.code(),
        count: end.count,
    }
}

fn other_leg(leg: &OtherLeg) -> JsonOtherLeg {
    JsonOtherLeg {
        address: leg.peer.ip(),
        port: leg.peer.port(),
        state: TcpState::Established.name(),
        count: leg.count,
        send_q: leg.send_q,
    }
}

fn process(diagnosis: &ProcessDiagnosis, elapsed: Duration) -> JsonProcess<'_> {
    let process = &diagnosis.process;
    let executable = diagnosis.status.executable.as_deref();
    let suspects = diagnosis.table.as_ref().map(|_| diagnosis.suspect_counts());
    JsonProcess {
        pid: process.id.pid,
        parent: diagnosis.status.parent,
        comm: &process.comm,
        unit: process.cgroup.unit.as_deref(),
        container: container(process),
        executable,
        runtime: diagnosis.runtime.map(LanguageRuntime::name),
        state: diagnosis.status.state,
        condition: diagnosis.condition.name(),
        uninterruptible_threads: &diagnosis.uninterruptible_threads,
        held: counts(&diagnosis.held, elapsed, diagnosis.circumstance()),
        shared: diagnosis.shared,
        waiting: diagnosis.waiting,
        other_leg: diagnosis
            .other_legs
            .as_ref()
            .map(|legs| legs.iter().take(MAX_LISTED).map(other_leg).collect()),
        inherited_from: diagnosis
            .inherited_from
            .as_ref()
            .map(|from| JsonProcessName {
                pid: from.id.pid,
                comm: &from.comm,
            }),
        process_per_connection: diagnosis.per_connection,
        descriptors: JsonDescriptorCounts {
            used: diagnosis.table.as_ref().map(|table| table.used),
            limit: diagnosis.status.limit,
            at_limit: diagnosis.is_at_limit(),
            dead: suspects.map(|counts| counts.dead),
            never_connected: suspects.map(|counts| counts.never_connected),
            unknown: suspects.map(|counts| counts.unknown),
        },
        next: diagnosis.suggestions.first().map(suggestion),
        then: diagnosis.suggestions.get(1).map(suggestion),
        trace: diagnosis.trace.as_ref().map(suggestion),
    }
}

fn suggestion(suggestion: &Suggestion) -> JsonSuggestion<'_> {
    JsonSuggestion {
        command: &suggestion.command,
        remark: &suggestion.remark,
    }
}

fn listener(
    diagnosis: &Diagnosis,
    listener_diagnosis: &ListenerDiagnosis,
) -> JsonDiagnosedListener {
    let listener = &diagnosis.scan.listeners[listener_diagnosis.listener];
    let owners = listener.owners.iter();
    let mut owners: Vec<i32> = owners.map(|owner| owner.process.id.pid).collect();
    owners.dedup();
    JsonDiagnosedListener {
        address: listener.local.ip(),
        port: listener.local.port(),
        backlog: listener.backlog(),
        waiting: listener.waiting(),
        owners,
        group_size: listener.group_size,
        possible_sockets: listener.sockets.len(),
        stalled: listener_diagnosis.is_stalled,
        counts: counts(
            &listener_diagnosis.connections,
            diagnosis.elapsed,
            diagnosis.circumstance(listener),
        ),
    }
}
