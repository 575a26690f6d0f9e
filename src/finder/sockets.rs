//! What the kernel says of the sockets in one network namespace.

use std::ops::ControlFlow;
use std::thread;

use super::listeners::Listeners;
use super::{FindError, Socket};
use crate::filter::selectors::Selectors;
use crate::filter::{self, bytecode};
use crate::sock_diag::{DumpError, DumpRequest, Family, SockDiag, SocketMessage};

/// The sockets of a namespace that match by what the kernel says of them.
pub(super) struct View {
    pub sockets: Vec<Socket>,
    /// Those of the sockets that were never accepted.
    pub listeners: Listeners,
    /// What of the expression means nothing here; in another namespace it may.
    pub unresolved: Option<FindError>,
}

/// Looks at the namespace of the calling thread. `alone`: nothing else keeps the processors busy.
pub(super) fn look(
    selectors: &Selectors,
    one_of_several: bool,
    alone: bool,
) -> Result<View, FindError> {
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
        false => Sample::Untold,
    };
    let mut sockets = match sample {
        Sample::All(sockets) => sockets,
        Sample::Halves(halves) => dump_in_halves(&mut diag, &selectors, &halves)?,
        Sample::Untold => dump(&mut diag, &selectors)?,
    };
    let mut listeners = Listeners::default();
    if sockets.iter().any(|socket| socket.cause.is_with_listener()) {
        listeners = Listeners::read(&mut diag)?;
    }
    for socket in &mut sockets {
        if socket.cause.is_with_listener() {
            socket.listener = listeners.accepting(&socket.id, socket.tuple.local);
        }
    }
    Ok(View {
        sockets,
        listeners,
        unresolved,
    })
}

/// What the beginning of a dump tells.
pub(crate) enum Sample {
    /// These few are all that match.
    All(Vec<Socket>),
    /// Many match. Two dumps side by side can share the work: each of these selects one half, by the peer ports, which no
    /// connection changes.
    Halves(Box<[Selectors; 2]>),
    /// Neither is told. What failed fails in a dump as well, which says so.
    Untold,
}

/// Looks at the first sockets of a dump. The kernel lists them in the order of a hash, so any are a fair sample of all.
pub(crate) fn sample(selectors: &Selectors) -> Sample {
    /// With so many, half of them is 2 % off the half of all with a probability of 2 in 3.
    const SAMPLE: usize = 512;
    let bytecode = bytecode::bytecode(&selectors.as_expression(), selectors.states());
    let mut sockets = Vec::new();
    for request in requests(selectors, &bytecode) {
        let keep = |message| matching(&message, selectors);
        let part = |mut more: Vec<Socket>, _| {
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
            _ => return Sample::Untold,
        }
    }
    Sample::All(sockets)
}

/// The two halves, split where it splits `some`.
fn halves(selectors: &Selectors, some: &[Socket]) -> Sample {
    if !selectors.peer_ports.is_empty() {
        return Sample::Untold;
    }
    let mut ports: Vec<u16> = some.iter().map(|s| s.tuple.peer.port()).collect();
    ports.sort_unstable();
    let middle = ports[ports.len() / 2].max(1);
    let half = |ports| Selectors {
        peer_ports: vec![ports],
        ..selectors.clone()
    };
    let lower = half(0..=middle - 1);
    // Half a dump is only half the work if the kernel leaves out the other half.
    match bytecode::bytecode(&lower.as_expression(), lower.states()).is_empty() {
        true => Sample::Untold,
        false => Sample::Halves(Box::new([lower, half(middle..=u16::MAX)])),
    }
}

fn dump_in_halves(
    diag: &mut SockDiag,
    selectors: &Selectors,
    [lower, upper]: &[Selectors; 2],
) -> Result<Vec<Socket>, FindError> {
    thread::scope(|scope| {
        let upper = thread::Builder::new().spawn_scoped(scope, || {
            let mut diag = SockDiag::open().map_err(FindError::Open)?;
            Ok::<_, FindError>(dump(&mut diag, upper)?)
        });
        let Ok(upper) = upper else {
            return Ok(dump(diag, selectors)?);
        };
        let mut sockets = dump(diag, lower)?;
        sockets.append(&mut super::joined(upper)?);
        Ok(sockets)
    })
}

/// The socket, if it matches as far as the kernel's message tells.
fn matching(message: &SocketMessage, selectors: &Selectors) -> Option<Socket> {
    let socket = Socket::from_message(message);
    selectors.match_socket(&socket).then_some(socket)
}

/// What to ask the kernel for, so that all that `selectors` match is in the answers.
pub(crate) fn requests<'b>(
    selectors: &Selectors,
    bytecode: &'b [u8],
) -> impl Iterator<Item = DumpRequest<'b>> {
    let states = selectors.states();
    // An IPv4 connection can be on an AF_INET6 socket, never the other way round.
    let without_v4 = selectors.wants_only_ipv6();
    let families = Family::ALL.into_iter();
    let families = families.filter(move |family| !(without_v4 && *family == Family::V4));
    families.map(move |family| DumpRequest {
        family,
        states,
        info: true,
        bytecode,
    })
}

fn dump(diag: &mut SockDiag, selectors: &Selectors) -> Result<Vec<Socket>, DumpError> {
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
