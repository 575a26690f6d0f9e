//! Requests and answers of HTTP/1.1 (RFC 9112), as far as a scrape needs them. Pure.

use std::sync::Arc;

/// A longer head of a request is refused. Prometheus sends some 300 bytes.
pub const MAX_HEAD: usize = 8 * 1024;

/// A request that has arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub is_head: bool,
    pub path: String,
}

/// What a status means, as its reason phrase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Ok = 200,
    BadRequest = 400,
    NotFound = 404,
    MethodNotAllowed = 405,
    HeadTooLarge = 431,
    ServiceUnavailable = 503,
}

impl Status {
    fn phrase(self) -> &'static str {
        match self {
            Status::Ok => "OK",
            Status::BadRequest => "Bad Request",
            Status::NotFound => "Not Found",
            Status::MethodNotAllowed => "Method Not Allowed",
            Status::HeadTooLarge => "Request Header Fields Too Large",
            Status::ServiceUnavailable => "Service Unavailable",
        }
    }
}

/// Reads a request from what has arrived so far; `None`: it is not complete. The fields of the head and a body do not matter.
///
/// # Errors
/// It is refused with this status.
pub fn parse(bytes: &[u8]) -> Result<Option<Request>, Status> {
    let Some(end) = head_end(bytes) else {
        return match bytes.len() < MAX_HEAD {
            true => Ok(None),
            false => Err(Status::HeadTooLarge),
        };
    };
    let head = std::str::from_utf8(&bytes[..end]).map_err(|_| Status::BadRequest)?;
    let line = head.lines().next().unwrap_or_default();
    let mut words = line.split(' ');
    let (Some(method), Some(target), Some(version), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(Status::BadRequest);
    };
    if !version.starts_with("HTTP/1.") || !target.starts_with('/') {
        return Err(Status::BadRequest);
    }
    let is_head = match method {
        "GET" => false,
        "HEAD" => true,
        _ if method.bytes().all(|byte| byte.is_ascii_alphabetic()) => {
            return Err(Status::MethodNotAllowed);
        }
        _ => return Err(Status::BadRequest),
    };
    let path = target.split('?').next().unwrap_or_default();
    Ok(Some(Request {
        is_head,
        path: path.to_owned(),
    }))
}

/// Where the empty line after the head begins. Some clients end lines with a line feed alone.
fn head_end(bytes: &[u8]) -> Option<usize> {
    let find = |end: &[u8]| bytes.windows(end.len()).position(|part| part == end);
    let places = find(b"\r\n\r\n").into_iter().chain(find(b"\n\n"));
    places.min()
}

/// An answer, ready to be sent.
#[derive(Clone, Debug)]
pub struct Answer {
    head: Vec<u8>,
    /// Shared by all connections.
    body: Arc<[u8]>,
}

impl Answer {
    /// `kind`: the media type of the body.
    pub fn new(status: Status, kind: &str, body: Arc<[u8]>, is_head: bool) -> Self {
        let allow = match status {
            Status::MethodNotAllowed => "Allow: GET, HEAD\r\n",
            _ => "",
        };
        let head = format!(
            "HTTP/1.1 {} {}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n{allow}Connection: close\r\n\r\n",
            status as u16,
            status.phrase(),
            body.len(),
        );
        Answer {
            head: head.into_bytes(),
            body: match is_head {
                true => Arc::default(),
                false => body,
            },
        }
    }

    /// With one line of text.
    pub fn line(status: Status, line: &str, is_head: bool) -> Self {
        let body = format!("{line}\n").into_bytes();
        Answer::new(status, "text/plain; charset=utf-8", body.into(), is_head)
    }

    /// What is still to be sent after the first `sent` bytes; empty at the end.
    pub fn rest(&self, sent: usize) -> &[u8] {
        match sent.checked_sub(self.head.len()) {
            None => &self.head[sent..],
            Some(of_body) => &self.body[of_body.min(self.body.len())..],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(text: &str) -> Result<Option<Request>, Status> {
        parse(text.as_bytes())
    }

    #[test]
    fn a_scrape_is_understood_at_whatever_place_it_is_cut() {
        let whole = "GET /metrics?x=1 HTTP/1.1\r\nHost: h\r\nAccept: text/plain\r\n\r\n";
        for end in 0..whole.len() {
            assert_eq!(request(&whole[..end]), Ok(None), "{end}");
        }
        let expected = Request {
            is_head: false,
            path: "/metrics".to_owned(),
        };
        assert_eq!(request(whole), Ok(Some(expected.clone())));
        assert_eq!(request("GET /metrics HTTP/1.0\n\n"), Ok(Some(expected)));
        let head = request("HEAD / HTTP/1.1\r\n\r\n").unwrap().unwrap();
        assert!(head.is_head);
    }

    #[test]
    fn what_is_no_request_is_refused() {
        for text in [
            "\r\n\r\n",
            "GET\r\n\r\n",
            "GET  /metrics HTTP/1.1\r\n\r\n",
            "GET /metrics HTTP/1.1 x\r\n\r\n",
            "GET /metrics HTTP/2\r\n\r\n",
            "GET metrics HTTP/1.1\r\n\r\n",
            "\u{16}\u{3}\u{1} / HTTP/1.1\r\n\r\n",
        ] {
            assert_eq!(request(text), Err(Status::BadRequest), "{text:?}");
        }
        assert_eq!(parse(b"\xff / HTTP/1.1\r\n\r\n"), Err(Status::BadRequest));
        for method in ["POST", "DELETE", "get"] {
            let text = format!("{method} /metrics HTTP/1.1\r\n\r\n");
            assert_eq!(request(&text), Err(Status::MethodNotAllowed), "{method}");
        }
        let endless = "GET / HTTP/1.1\r\n".to_owned() + &"X: y\r\n".repeat(MAX_HEAD);
        assert_eq!(request(&endless), Err(Status::HeadTooLarge));
    }

    #[test]
    fn an_answer_can_be_sent_in_any_parts() {
        let answer = Answer::new(Status::Ok, "text/plain", Arc::from(*b"body"), false);
        let whole = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 4\r\nConnection: close\r\n\r\nbody";
        for size in 1..whole.len() {
            let mut sent = Vec::new();
            while !answer.rest(sent.len()).is_empty() {
                let rest = answer.rest(sent.len());
                sent.extend_from_slice(&rest[..size.min(rest.len())]);
            }
            assert_eq!(sent, whole, "{size}");
        }
        let head = Answer::new(Status::Ok, "text/plain", Arc::from(*b"body"), true);
        assert!(head.rest(0).ends_with(b"\r\n\r\n"));
        assert!(head.rest(head.rest(0).len()).is_empty());
        let refused = Answer::line(Status::MethodNotAllowed, "no", false);
        assert!(String::from_utf8_lossy(refused.rest(0)).contains("\r\nAllow: GET, HEAD\r\n"));
    }
}
