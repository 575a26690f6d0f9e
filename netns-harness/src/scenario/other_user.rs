//! `other-user`: the application is another user's. Needs root: a user namespace has one user only.

use super::{App, Scenario, Sharing};

/// The one user that every machine has beside root.
const APP: App = App {
    comm: "leaky-app",
    uid: Some(65534),
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
