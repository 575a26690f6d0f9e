//! Marks the sockets whose local address is not an address of this host any more.

use crate::model::Target;
use crate::routes;

/// Sets [`crate::model::Socket::address_gone`] of each target, in the namespace of the calling thread. With `only`, then drops the
/// others.
pub(super) fn mark_gone(targets: &mut Vec<Target>, only: bool) {
    let gone = routes::not_local(targets.iter().map(|target| target.socket.place()));
    if !gone.is_empty() {
        for target in targets.iter_mut() {
            let socket = &mut target.socket;
            socket.address_gone = socket.is_gone_with(&gone);
        }
    }
    if only {
        targets.retain(|target| target.socket.address_gone);
    }
}
