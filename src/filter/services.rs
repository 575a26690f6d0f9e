//! Names of TCP services, from /etc/services.

use std::cell::OnceCell;
use std::fs;

/// The services of this host. The file is read at the first lookup.
///
/// cwkill does not use getservbyname(3): that needs `unsafe`, is not safe with threads, and may ask the network. See
/// docs/decisions/expressions.md.
#[derive(Debug)]
pub struct Services {
    text: OnceCell<String>,
}

const FILE: &str = "/etc/services";

impl Services {
    /// The services in /etc/services; none if that file is missing.
    pub fn of_this_host() -> Self {
        Services {
            text: OnceCell::new(),
        }
    }

    /// The services in `text`, in the format of services(5).
    pub fn from_text(text: &str) -> Self {
        Services {
            text: OnceCell::from(text.to_owned()),
        }
    }

    /// The TCP port of the service with this name or alias.
    pub fn port(&self, name: &str) -> Option<u16> {
        let read = || {
            let bytes = fs::read(FILE).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        port_in(self.text.get_or_init(read), name)
    }
}

/// Lines are `name port/protocol alias…`. A `#` begins a comment.
fn port_in(text: &str, name: &str) -> Option<u16> {
    text.lines().find_map(|line| {
        let line = line.split('#').next()?;
        let mut words = line.split_whitespace();
        let official = words.next()?;
        let (port, protocol) = words.next()?.split_once('/')?;
        let named = official == name || words.any(|alias| alias == name);
        (named && protocol == "tcp")
            .then(|| port.parse().ok())
            .flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_aliases_of_tcp() {
        let services = Services::from_text(
            "# comment\nhttp\t80/tcp\twww # http\nhttps 443/udp\nhttps 443/tcp\n\nbad\nworse x/tcp\n",
        );
        for (name, port) in [
            ("http", Some(80)),
            ("www", Some(80)),
            ("https", Some(443)),
            ("#", None),
            ("bad", None),
            ("worse", None),
            ("", None),
        ] {
            assert_eq!(services.port(name), port, "{name}");
        }
    }
}
