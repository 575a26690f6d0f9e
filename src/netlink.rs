//! Netlink messages (netlink(7)): writing a request, splitting a datagram, and bearing lost answers. Pure.

use std::io;

use netlink_packet_core::{Emitable, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer, NetlinkHeader};

/// `struct nlmsghdr`, and an attribute without its value.
pub(crate) const HEADER_LEN: usize = 16;
pub(crate) const ATTRIBUTE_LEN: usize = 4;
/// The maximum number of overruns while one answer is received. The kernel reports an overrun once and goes on
/// (net/netlink/af_netlink.c, netlink_overrun), so more of them mean that something else answers in its place.
const MAX_OVERRUNS: u32 = 1000;

/// Appends a message to `bytes`.
///
/// # Panics
/// The message is longer than 4 GiB.
pub(crate) fn put_message(
    bytes: &mut Vec<u8>,
    message_type: u16,
    flags: u16,
    sequence: u32,
    body: &[u8],
) {
    put_header(bytes, body.len(), message_type, flags, sequence);
    bytes.extend(body);
}

/// Appends the header of a message with `body` bytes after the header.
///
/// # Panics
/// As [`put_message`].
pub(crate) fn put_header(
    bytes: &mut Vec<u8>,
    body: usize,
    message_type: u16,
    flags: u16,
    sequence: u32,
) {
    let mut header = NetlinkHeader::default();
    header.length = u32::try_from(HEADER_LEN + body).expect("requests are short");
    header.message_type = message_type;
    header.flags = flags;
    header.sequence_number = sequence;
    let start = bytes.len();
    bytes.resize(start + HEADER_LEN, 0);
    header.emit(&mut bytes[start..]);
}

/// Appends an attribute to `body`, with its padding.
///
/// # Panics
/// The value is longer than 64 KiB.
pub(crate) fn put_attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(ATTRIBUTE_LEN + value.len()).expect("values are short");
    body.extend(length.to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

/// The messages of a datagram. Bytes that are not a message end the list.
pub(crate) fn messages(datagram: &[u8]) -> impl Iterator<Item = NetlinkBuffer<&[u8]>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let view = NetlinkBuffer::new_checked(rest).ok()?;
        let length = usize::try_from(view.length()).unwrap_or(usize::MAX);
        // Messages start at multiples of four bytes. The last one may lack its padding.
        rest = &rest[length.next_multiple_of(4).min(rest.len())..];
        Some(view)
    })
}

/// The attributes in `bytes`: kind, without the bits for nesting and byte order, and value. One that is cut short ends the list.
pub(crate) fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    const KIND_MASK: u16 = 0x3fff;
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*rest.first_chunk()?));
        let kind = u16::from_ne_bytes(*rest.get(2..)?.first_chunk()?);
        let value = rest.get(ATTRIBUTE_LEN..length)?;
        // Attributes start at multiples of four bytes. The last one may lack its padding.
        rest = &rest[length.next_multiple_of(4).min(rest.len())..];
        Some((kind & KIND_MASK, value))
    })
}

/// The errno of an error message, 0 for an acknowledgement; `None` for any other message.
pub(crate) fn errno(message: &NetlinkBuffer<&[u8]>) -> Option<i32> {
    let is_error = message.message_type() == NLMSG_ERROR;
    let payload = message.payload();
    let errno = payload.first_chunk().filter(|_| is_error)?;
    Some(i32::from_ne_bytes(*errno).saturating_neg())
}

/// The errno with which a list ends, 0 for none; `None` for a message of the list.
pub(crate) fn end_of_list(message: &NetlinkBuffer<&[u8]>) -> Option<i32> {
    match message.message_type() {
        NLMSG_DONE => {
            let errno = message.payload().first_chunk();
            Some(errno.map_or(0, |errno| i32::from_ne_bytes(*errno).saturating_neg()))
        }
        _ => errno(message),
    }
}

/// Adds the messages of the type `kind` in a datagram of a list to `items`, as `parse` reads them. Returns whether the list has ended.
///
/// # Errors
/// The errno with which the kernel has broken the list off. EBADMSG: `parse` cannot read one.
pub(crate) fn add_items<T>(
    items: &mut Vec<T>,
    datagram: &[u8],
    kind: u16,
    parse: impl Fn(&[u8]) -> Option<T>,
) -> io::Result<bool> {
    for message in messages(datagram) {
        match end_of_list(&message) {
            Some(0) => return Ok(true),
            Some(errno) => return Err(io::Error::from_raw_os_error(errno)),
            None => {}
        }
        if message.message_type() == kind {
            let unreadable = || io::Error::from_raw_os_error(libc::EBADMSG);
            items.push(parse(message.payload()).ok_or_else(unreadable)?);
        }
    }
    Ok(false)
}

/// The overruns of a receive queue while one answer is received. At each, the kernel has lost datagrams.
#[derive(Debug, Default)]
pub(crate) struct Overruns(u32);

impl Overruns {
    /// Counts `error` of recv(2) as an overrun.
    ///
    /// # Errors
    /// `error`: it is another one than ENOBUFS, or there were more than [`MAX_OVERRUNS`].
    pub(crate) fn note(&mut self, error: io::Error) -> io::Result<()> {
        self.0 += 1;
        match error.raw_os_error() == Some(libc::ENOBUFS) && self.0 <= MAX_OVERRUNS {
            true => Ok(()),
            false => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overruns_without_end_are_an_error() {
        let no_room = || io::Error::from_raw_os_error(libc::ENOBUFS);
        let mut overruns = Overruns::default();
        for _ in 0..MAX_OVERRUNS {
            overruns.note(no_room()).unwrap();
        }
        let error = overruns.note(no_room()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOBUFS));
        let other = io::Error::from_raw_os_error(libc::ENOMEM);
        let error = Overruns::default().note(other).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOMEM));
    }

    #[test]
    fn a_list_ends_well_or_with_an_errno() {
        const ITEM: u16 = 0x13;
        let parse = |payload: &[u8]| payload.first_chunk().map(|it| u32::from_ne_bytes(*it));
        let list = |messages: &[(u16, &[u8])]| {
            let mut datagram = Vec::new();
            for (kind, body) in messages {
                put_message(&mut datagram, *kind, 0, 7, body);
            }
            let mut items = Vec::new();
            let ended = add_items(&mut items, &datagram, ITEM, parse);
            (ended.map_err(|error| error.raw_os_error().unwrap()), items)
        };
        let (one, errno) = (1u32.to_ne_bytes(), (-libc::EBUSY).to_ne_bytes());
        let item = (ITEM, &one[..]);
        let done = (NLMSG_DONE, &[0; 4][..]);
        assert_eq!(list(&[item]), (Ok(false), vec![1]));
        assert_eq!(list(&[item, (9, &one), item, done]), (Ok(true), vec![1, 1]));
        for kind in [NLMSG_DONE, NLMSG_ERROR] {
            assert_eq!(list(&[(kind, &errno)]).0, Err(libc::EBUSY));
        }
        assert_eq!(list(&[(ITEM, &[1]), done]).0, Err(libc::EBADMSG));
    }

    #[test]
    fn attributes_are_split_at_their_lengths() {
        let mut body = Vec::new();
        put_attribute(&mut body, 0x8003, &[1, 2, 3]);
        put_attribute(&mut body, 7, &[]);
        put_attribute(&mut body, 9, &[4]);
        let expected: [(u16, &[u8]); 3] = [(3, &[1, 2, 3]), (7, &[]), (9, &[4])];
        assert_eq!(attributes(&body).collect::<Vec<_>>(), expected);
        // The last one without its padding, and cut.
        assert_eq!(attributes(&body[..body.len() - 3]).count(), 3);
        assert_eq!(attributes(&body[..body.len() - 4]).count(), 2);
        assert_eq!(attributes(&[3, 0, 1, 0, 4, 0, 1, 0]).count(), 0);
    }

    #[test]
    fn a_datagram_is_split_into_its_messages() {
        let mut datagram = Vec::new();
        put_message(&mut datagram, NLMSG_ERROR, 0, 7, &(-13i32).to_ne_bytes());
        let mut body = Vec::new();
        put_attribute(&mut body, 3, &[1, 2, 3]);
        assert_eq!(body.len(), 8, "padded");
        put_message(&mut datagram, 20, 5, 8, &body);
        datagram.extend([1, 2, 3]);
        let read: Vec<_> = messages(&datagram)
            .map(|message| {
                let number = (message.message_type(), message.sequence_number());
                (number, errno(&message), message.payload().len())
            })
            .collect();
        assert_eq!(read, [((NLMSG_ERROR, 7), Some(13), 4), ((20, 8), None, 8)]);
        assert_eq!(messages(&datagram[..10]).count(), 0);
    }
}
