//! Marks the sockets whose local address is not an address of this host any more.

use crate::model::Target;
use crate::routes;

/// Sets [`crate::model::Socket::address_gone`] of each target, in the namespace of the calling thread. With `only`, then drops the
/// others.
pub(super) fn mark_gone(targets: &mut Vec<Target>, only: bool) {
    let not_local = routes::not_local(targets.iter().map(|target| target.socket.place()));
    if !not_local.is_empty() {
        for target in targets.iter_mut() {
            let socket = &mut target.socket;
            socket.address_gone = socket.has_lost_address(&not_local);
        }
    }
    if only {
        targets.retain(|target| target.socket.address_gone);
    }
}
