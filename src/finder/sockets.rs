//! The sockets of one network namespace, as the kernel lists them.

use std::ops::ControlFlow;
use std::thread;

use super::listeners::Listeners;
use super::{FindError, join};
use crate::filter::selectors::Selectors;
use crate::filter::{self, bytecode};
use crate::model::{Socket, Target};
use crate::sock_diag::{DumpError, DumpRequest, Family, SockDiag, SocketMessage};

/// The sockets of a namespace that match by what the kernel says of them.
pub(super) struct NetnsScan {
    pub sockets: Vec<Target>,
    /// Those of the sockets that were never accepted.
    pub listeners: Listeners,
    /// What of the expression means nothing here; in another namespace it may.
    pub unresolved: Option<FindError>,
}

/// Scans the namespace of the calling thread. `alone`: no other thread keeps the processors busy.
pub(super) fn scan(
    selectors: &Selectors,
    one_of_several: bool,
    alone: bool,
) -> Result<NetnsScan, FindError> {
    let mut diag = SockDiag::open().map_err(FindError::Open)?;
    let resolve = |one_of_several| {
        let here = filter::ThisNamespace { one_of_several };
        selectors.resolved(&here).map_err(FindError::Expression)
    };
    let (selectors, unresolved) = match resolve(false) {
        Ok(selectors) => (selectors, None),
        Err(error) if one_of_several => (resolve(true)?, Some(error)),
        Err(error) => return Err(error),
    };
    let sample = match alone {
        true => sample(&selectors),
        false => Sample::Unknown,
    };
    let mut sockets = match sample {
        Sample::All(sockets) => sockets,
        Sample::Halves(halves) => dump_in_halves(&mut diag, &selectors, &halves)?,
        Sample::Unknown => dump(&mut diag, &selectors)?,
    };
    let mut listeners = Listeners::default();
    let with_listener = |target: &Target| target.socket.cause.is_with_listener();
    if sockets.iter().any(with_listener) {
        listeners = Listeners::read(&mut diag)?;
    }
    for target in sockets.iter_mut().filter(|target| with_listener(target)) {
        target.listener = listeners.accepting(&target.socket.id, target.socket.tuple.local);
    }
    Ok(NetnsScan {
        sockets,
        listeners,
        unresolved,
    })
}

/// What the beginning of a dump tells.
pub(crate) enum Sample {
    /// These few are all that match.
    All(Vec<Target>),
    /// Many match. Two dumps side by side can share the work: each of these selects one half, by the peer ports, which no
    /// connection changes.
    Halves(Box<[Selectors; 2]>),
    /// Neither is told. What failed fails in a dump as well, which says so.
    Unknown,
}

/// Looks at the first sockets of a dump. The kernel lists them in the order of a hash, so any are a fair sample of all.
pub(crate) fn sample(selectors: &Selectors) -> Sample {
    /// With so many, half of them is 2 % off the half of all with a probability of 2 in 3.
    const SAMPLE: usize = 512;
    let bytecode = bytecode::bytecode(&selectors.as_expression(), selectors.states());
    let mut sockets = Vec::new();
    for request in requests(selectors, &bytecode) {
        let keep = |message| matching(&message, selectors);
        let part = |mut more: Vec<Target>, _| {
            sockets.append(&mut more);
            match sockets.len() < SAMPLE {
                true => ControlFlow::Continue(()),
                false => ControlFlow::Break(()),
            }
        };
        // A dump that is broken off leaves its socket busy.
        let listed = SockDiag::open().map(|mut diag| diag.stream(&request, keep, part));
        match listed {
            _ if sockets.len() >= SAMPLE => return halves(selectors, &sockets),
            Ok(Ok(true)) => {}
            _ => return Sample::Unknown,
        }
    }
    Sample::All(sockets)
}

/// The two halves, split where it splits `some`.
fn halves(selectors: &Selectors, some: &[Target]) -> Sample {
    if !selectors.peer_ports.is_empty() {
        return Sample::Unknown;
    }
    let mut ports: Vec<u16> = some
        .iter()
        .map(|some| some.socket.tuple.peer.port())
        .collect();
    ports.sort_unstable();
    let middle = ports[ports.len() / 2].max(1);
    let half = |ports| Selectors {
        peer_ports: vec![ports],
        ..selectors.clone()
    };
    let lower = half(0..=middle - 1);
    // Half a dump is only half the work if the kernel leaves out the other half.
    match bytecode::bytecode(&lower.as_expression(), lower.states()).is_empty() {
        true => Sample::Unknown,
        false => Sample::Halves(Box::new([lower, half(middle..=u16::MAX)])),
    }
}

fn dump_in_halves(
    diag: &mut SockDiag,
    selectors: &Selectors,
    [lower, upper]: &[Selectors; 2],
) -> Result<Vec<Target>, FindError> {
    thread::scope(|scope| {
        let upper = thread::Builder::new().spawn_scoped(scope, || {
            let mut diag = SockDiag::open().map_err(FindError::Open)?;
            Ok::<_, FindError>(dump(&mut diag, upper)?)
        });
        let Ok(upper) = upper else {
            return Ok(dump(diag, selectors)?);
        };
        let mut sockets = dump(diag, lower)?;
        sockets.append(&mut join(upper)?);
        Ok(sockets)
    })
}

/// The target, if its socket matches as far as the kernel's message tells.
fn matching(message: &SocketMessage, selectors: &Selectors) -> Option<Target> {
    let socket = Socket::from_message(message);
    selectors.match_socket(&socket).then(|| Target::new(socket))
}

/// What to ask the kernel for, so that all that `selectors` match is in the answers.
pub(crate) fn requests<'b>(
    selectors: &Selectors,
    bytecode: &'b [u8],
) -> impl Iterator<Item = DumpRequest<'b>> {
    let states = selectors.states();
    // An IPv4 connection can be on an AF_INET6 socket, never the other way round.
    let without_v4 = selectors.selects_only_ipv6();
    let families = Family::ALL.into_iter();
    let families = families.filter(move |family| !(without_v4 && *family == Family::V4));
    families.map(move |family| DumpRequest {
        family,
        states,
        info: true,
        bytecode,
    })
}

fn dump(diag: &mut SockDiag, selectors: &Selectors) -> Result<Vec<Target>, DumpError> {
    let bytecode = bytecode::bytecode(&selectors.as_expression(), selectors.states());
    let mut sockets = Vec::new();
    for mut request in requests(selectors, &bytecode) {
        let mut keep = |message| matching(&message, selectors);
        let dumped = match diag.dump(&request, &mut keep) {
            // An old kernel does not know an operation; the predicate does.
            Err(DumpError::Io(error))
                if error.raw_os_error() == Some(libc::EINVAL) && !bytecode.is_empty() =>
            {
                request.bytecode = &[];
                diag.dump(&request, &mut keep)
            }
            other => other,
        };
        let mut dumped = dumped?;
        match sockets.is_empty() {
            true => sockets = dumped,
            false => sockets.append(&mut dumped),
        }
    }
    Ok(sockets)
}
