//! The values of `src` and `dst`: an address or a network, a port, or both.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::lexer::{Fault, Input, ParseResult, port_number, unequal, value};
use crate::filter::syntax_error::quoted;
use crate::filter::{End, Expression};

/// Parses `src [= | !=] HOST` after the keyword.
pub(super) fn condition(input: &mut Input<'_>, end: End, keyword: &str) -> ParseResult<Expression> {
    let example = format!("{keyword} 10.0.0.0/8 or {keyword} [2001:db8::1]:443 or {keyword} :8080");
    let unequal = unequal(input, keyword, &example)?;
    let (text, span) = value(input, "an address", &example)?;
    let fault = |message| Fault::new(span.clone(), message, example.clone());
    let (address, port) = split(text).map_err(fault)?;

    let mut parts = Vec::new();
    if !matches!(address, "" | "*" | "any" | "all" | "default") {
        parts.push(Expression::Address(end, network(address).map_err(fault)?));
    }
    if let Some(port) = port.filter(|port| *port != "*") {
        let span = span.end - port.len()..span.end;
        let port = port_number(input.state.services, port, span, &example)?;
        parts.push(Expression::Port(end, port..=port));
    }
    let tree = match parts.len() {
        1 => parts.remove(0),
        _ => Expression::All(parts),
    };
    Ok(match unequal {
        true => tree.negated(),
        false => tree,
    })
}

/// Splits an address from its port.
fn split(text: &str) -> Result<(&str, Option<&str>), String> {
    let port = |rest: &'_ str| match rest.strip_prefix(':') {
        Some(_) => Ok(()),
        None => Err(format!("{} stands where only :PORT may", quoted(rest))),
    };
    if let Some(inner) = text.strip_prefix('[') {
        let (address, rest) = inner
            .split_once(']')
            .ok_or("this `[` is never closed".to_owned())?;
        if address.is_empty() {
            return Err("the brackets are empty".into());
        }
        if rest.is_empty() {
            return Ok((address, None));
        }
        port(rest)?;
        return Ok((address, Some(&rest[1..])));
    }
    // If there is a length, the colon before the port comes after it.
    let length = text.find('/').unwrap_or(0);
    if length == 0 && text.parse::<Ipv6Addr>().is_ok() {
        // `2001:db8::1:80` could be an address or an address and a port.
        return Err(format!("an IPv6 address needs brackets: [{text}]"));
    }
    match text[length..].rfind(':') {
        None => Ok((text, None)),
        Some(colon) => {
            let (address, port) = text.split_at(length + colon);
            Ok((address, Some(&port[1..])))
        }
    }
}

/// Parses an address or a network. Address bits beyond the length are cleared.
fn network(text: &str) -> Result<IpNet, String> {
    let Some((address, length)) = text.split_once('/') else {
        return match text.parse::<IpAddr>() {
            Ok(address) => Ok(IpNet::from(address)),
            Err(_) if text.parse::<u16>().is_ok() => {
                Err(format!("`{text}` is not an address; a port is :{text}"))
            }
            Err(_) if abbreviated(text).is_some() => Err(format!(
                "`{text}` is only a part of an address; with a length it is a network: {text}/{}",
                8 * text.split('.').count()
            )),
            Err(_) => Err(format!(
                "{} is not an address; host names are not resolved",
                quoted(text)
            )),
        };
    };
    let no_length = || {
        format!(
            "{} is not a prefix length for {}",
            quoted(length),
            quoted(address)
        )
    };
    if let Some(v4) = abbreviated(address) {
        let network = match length.parse::<Ipv4Addr>() {
            Ok(mask) => Ipv4Net::with_netmask(v4, mask).ok(),
            Err(_) => length.parse().ok().and_then(|l| Ipv4Net::new(v4, l).ok()),
        };
        return Ok(network.ok_or_else(no_length)?.trunc().into());
    }
    let v6 = address.parse::<Ipv6Addr>().map_err(|_| {
        let address = quoted(address);
        format!("{address} is not an address; host names are not resolved")
    })?;
    let length = length.parse().map_err(|_| no_length())?;
    let network = Ipv6Net::new(v6, length).map_err(|_| no_length())?;
    Ok(network.trunc().into())
}

/// Parses an IPv4 address whose last bytes may be missing, as in `193.233.7/24` of ss(8).
fn abbreviated(text: &str) -> Option<Ipv4Addr> {
    let mut bytes = [0; 4];
    let mut given = text.split('.');
    for byte in &mut bytes {
        match given.next() {
            Some(text) if text.len() > 1 && text.starts_with('0') => return None,
            Some(text) => *byte = text.parse().ok()?,
            None => break,
        }
    }
    given.next().is_none().then_some(Ipv4Addr::from(bytes))
}
