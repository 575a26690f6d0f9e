//! `other-user`: another user runs the application. Needs root, because a user namespace has only one user.

use super::{App, LEAKY_APP, Scenario, Sharing};

/// Runs as `nobody`, a user that every machine has.
const APP: App = App {
    uid: Some(65534),
    ..LEAKY_APP
};

pub(super) const SCENARIO: Scenario = Scenario {
    app: APP,
    sharing: Sharing::Never,
    ..Scenario::new(
        "other-user",
        "CLOSE-WAIT: the application runs as user 65534 (needs root)",
        |stage| stage.leaked(),
    )
};
