//! The report of `cwkill gateway` for programs. Fields are added, never renamed.

use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr};

use serde::Serialize;

use super::{ForwardedCounts, ForwardedRun};
use crate::model::{EntryDeletion, Forwarded, ForwardedOutcome, TimeAndPlace};
use crate::report::serialize::{
    Endpoint, JsonTimeAndPlace, SCHEMA_VERSION, endpoint, json_time, json_time_and_place, millis,
    serializer, write_around,
};
use crate::tcp::Tuple;

/// The fields before the connections.
#[derive(Serialize)]
struct Head<'a> {
    schema_version: u32,
    cwkill_version: &'static str,
    #[serde(flatten)]
    time_and_place: JsonTimeAndPlace<'a>,
    /// `probe` or `cut`; null in a listing.
    act: Option<&'static str>,
    dry_run: bool,
}

/// The fields after the connections.
#[derive(Serialize)]
struct Tail {
    /// They match, and have an end on this host.
    ending_here: usize,
    /// They match, except for `--min-age`.
    younger: usize,
    /// As before; the time of their last packet is unknown.
    of_unknown_age: usize,
    /// Entries of all protocols, and how many there may be; null if conntrack is not loaded.
    table_entries: Option<u64>,
    table_size: Option<u64>,
    /// Rules give connections timeouts of their own.
    timeout_policies: bool,
    flow_tables: bool,
    summary: ForwardedCounts,
}

#[derive(Serialize)]
struct ConnectionLine<'a> {
    schema_version: u32,
    /// The start of the run.
    time: &'a str,
    #[serde(flatten)]
    connection: JsonForwarded<'a>,
}

/// The addresses of packets in one direction.
#[derive(Serialize)]
struct Direction {
    src: Endpoint,
    dst: Endpoint,
}

#[derive(Serialize)]
pub struct JsonForwarded<'a> {
    family: &'static str,
    /// As the end that has opened the connection sends them.
    original: Direction,
    /// As the other end sends them.
    reply: Direction,
    /// The new source, if NAT changes it.
    nat_src: Option<Endpoint>,
    /// The real destination, if NAT changes it.
    nat_dst: Option<Endpoint>,
    state: Option<&'static str>,
    status: Vec<&'static str>,
    /// The time without a packet, at least.
    age_ms: Option<u64>,
    timeout_left_ms: Option<u64>,
    mark: Option<u32>,
    zone: u16,
    /// Of the entry: 8 hex digits. Null for a connection without an entry.
    id: Option<String>,
    /// What is to be done; null in a listing, and if it is skipped.
    plan: Option<&'static str>,
    skip: Option<String>,
    skip_code: Option<&'static str>,
    /// Null before the act.
    result: Option<JsonResult<'a>>,
}

#[derive(Serialize)]
struct JsonResult<'a> {
    outcome: &'static str,
    reason: Option<String>,
    reason_code: Option<&'a str>,
    source: JsonEnd,
    destination: JsonEnd,
    /// What became of the entry; null if it was not to be deleted.
    entry: Option<&'static str>,
}

#[derive(Serialize)]
struct JsonEnd {
    address: IpAddr,
    port: u16,
    /// Its first answer, and what is known of it afterwards.
    first: &'static str,
    now: &'static str,
    resets: u8,
}

fn json_result(connection: &Forwarded) -> Option<JsonResult<'_>> {
    let outcome = connection.outcome.as_ref()?;
    let (reason, reason_code) = match outcome {
        ForwardedOutcome::Skipped(why) => (Some(why.to_string()), Some(why.code())),
        ForwardedOutcome::Failed(why) => (Some(why.to_string()), Some(why.code())),
        _ => (None, None),
    };
    let end = |side: usize| {
        let (address, end) = (connection.end_addresses()[side], connection.ends[side]);
        JsonEnd {
            address: address.ip(),
            port: address.port(),
            first: end.first.name(),
            now: end.now.name(),
            resets: end.resets,
        }
    };
    Some(JsonResult {
        outcome: outcome.name(),
        reason,
        reason_code,
        source: end(0),
        destination: end(1),
        entry: connection.deleted.as_ref().map(EntryDeletion::code),
    })
}

pub(crate) fn json_forwarded<'a>(
    run: &ForwardedRun,
    connection: &'a Forwarded,
) -> JsonForwarded<'a> {
    let Forwarded {
        entry, quiet, skip, ..
    } = connection;
    let direction = |seen: Tuple| Direction {
        src: endpoint(seen.local),
        dst: endpoint(seen.peer),
    };
    let new = |address: Option<SocketAddr>| address.map(endpoint);
    JsonForwarded {
        family: match entry.original.local.is_ipv4() {
            true => "ipv4",
            false => "ipv6",
        },
        original: direction(entry.original),
        reply: direction(entry.reply),
        nat_src: new(entry.nat_source()),
        nat_dst: new(entry.nat_destination()),
        state: entry.state.map(|state| state.name()),
        status: entry.status.names().collect(),
        age_ms: quiet.map(millis),
        timeout_left_ms: entry.left.map(millis),
        mark: entry.mark,
        zone: entry.zone.id,
        id: entry.id.map(|id| format!("{id:08x}")),
        plan: run.act.filter(|_| skip.is_none()).map(|act| act.name()),
        skip: skip.map(|skip| skip.to_string()),
        skip_code: skip.map(|skip| skip.code()),
        result: json_result(connection),
    }
}

/// Writes one document with every connection and the summary.
pub fn write_document(
    run: &ForwardedRun,
    time_and_place: &TimeAndPlace,
    out: &mut dyn Write,
) -> io::Result<()> {
    let scan = &run.scan;
    let head = Head {
        schema_version: SCHEMA_VERSION,
        cwkill_version: env!("CARGO_PKG_VERSION"),
        time_and_place: json_time_and_place(time_and_place),
        act: run.act.map(|act| act.name()),
        dry_run: !run.acted,
    };
    let tail = Tail {
        ending_here: scan.ends_here,
        younger: scan.younger,
        of_unknown_age: scan.of_unknown_age,
        table_entries: scan.table_use.map(|(used, _)| used),
        table_size: scan.table_use.map(|(_, most)| most),
        timeout_policies: scan.timeouts.by_policy,
        flow_tables: scan.timeouts.has_flow_tables,
        summary: run.counts(),
    };
    write_around(&head, "connections", &tail, out, |out| {
        for (index, connection) in scan.connections.iter().enumerate() {
            if index > 0 {
                out.write_all(b",")?;
            }
            json_forwarded(run, connection).serialize(&mut serializer(&mut *out))?;
        }
        Ok(())
    })
}

/// Writes one line per connection, each a JSON object.
pub fn write_lines(
    run: &ForwardedRun,
    time_and_place: &TimeAndPlace,
    out: &mut dyn Write,
) -> io::Result<()> {
    let time = &json_time(time_and_place);
    for connection in &run.scan.connections {
        let line = ConnectionLine {
            schema_version: SCHEMA_VERSION,
            time,
            connection: json_forwarded(run, connection),
        };
        line.serialize(&mut serializer(&mut *out))?;
        out.write_all(b"\n")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::super::tests::run;
    use super::*;
    use crate::conntrack::Entry;
    use crate::model::{EndReport, EndState, ForwardedScan};
    use serde_json::{Value, json};

    #[test]
    fn a_document_has_both_directions_and_null_for_what_is_unknown() {
        let redirected = Entry {
            reply: Tuple {
                local: "10.9.2.2:8080".parse().unwrap(),
                peer: "10.9.1.2:4000".parse().unwrap(),
            },
            ..Entry::example("10.9.1.2:4000", "192.0.2.80:80")
        };
        let bare = Entry {
            state: None,
            left: None,
            mark: None,
            id: None,
            ..Entry::example("[fd00::1]:5", "[fd00::2]:80")
        };
        let mut first = Forwarded::new(redirected, Some(Duration::from_millis(1500)));
        first.outcome = Some(ForwardedOutcome::Cut);
        first.deleted = Some(EntryDeletion::Deleted);
        first.ends[1] = EndReport {
            first: EndState::Alive,
            now: EndState::Gone,
            resets: 1,
        };
        let scan = ForwardedScan {
            connections: vec![first, Forwarded::new(bare, None)],
            ends_here: 4,
            ..ForwardedScan::default()
        };
        let run = run(scan);
        let place = TimeAndPlace {
            time: SystemTime::UNIX_EPOCH,
            host: "router".into(),
            boot_id: None,
        };
        let mut out = Vec::new();
        write_document(&run, &place, &mut out).unwrap();
        let document: Value = serde_json::from_slice(&out).unwrap();
        let address = |address: &str, port: u16| json!({ "address": address, "port": port });
        let first = &document["connections"][0];
        assert_eq!(first["original"]["dst"], address("192.0.2.80", 80));
        assert_eq!(first["reply"]["src"], address("10.9.2.2", 8080));
        assert_eq!(
            (&first["nat_dst"], &first["nat_src"]),
            (&address("10.9.2.2", 8080), &Value::Null)
        );
        assert_eq!(
            (&first["age_ms"], &first["state"]),
            (&json!(1500), &json!("established"))
        );
        assert_eq!(
            (&first["id"], &first["status"]),
            (&json!("00000007"), &json!(["seen-reply", "assured"]))
        );
        assert_eq!(
            first["result"]["destination"],
            json!({ "address": "10.9.2.2", "port": 8080, "first": "alive", "now": "gone", "resets": 1 })
        );
        assert_eq!(
            (&first["result"]["outcome"], &first["result"]["entry"]),
            (&json!("cut"), &json!("deleted"))
        );
        let second = &document["connections"][1];
        for unknown in [
            "age_ms",
            "state",
            "timeout_left_ms",
            "mark",
            "id",
            "nat_src",
            "nat_dst",
        ] {
            assert_eq!(second[unknown], Value::Null, "{unknown}");
        }
        assert_eq!(second["family"], "ipv6");
        assert_eq!(
            (&document["ending_here"], &document["summary"]["matched"]),
            (&json!(4), &json!(2))
        );
        let mut lines = Vec::new();
        write_lines(&run, &place, &mut lines).unwrap();
        let lines = String::from_utf8(lines).unwrap();
        let line: Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
        assert_eq!(
            (&line["zone"], &line["time"]),
            (&json!(0), &json!("1970-01-01T00:00:00.000Z"))
        );
        assert_eq!(lines.lines().count(), 2);
    }
}
