//! `[dsm.NAME]`: connections to KMIP servers.

use serde::{Deserialize, Deserializer, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// IANA's port for KMIP.
const DEFAULT_PORT: u16 = 5696;

/// A named connection: servers that hold the same keys.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct DsmConnection {
    /// `host:port`, in the order in which they are asked; the port is 5696 if absent.
    pub servers: Vec<String>,
    /// PEM file of the authorities that sign the servers' certificates. No other is trusted.
    pub ca_file: PathBuf,
    /// PEM file of the client's certificate, with those between it and its authority.
    pub cert_file: PathBuf,
    /// PEM file of its private key, not encrypted.
    pub key_file: PathBuf,
    /// The name that the servers' certificates have, where it is not the host's.
    #[serde(default)]
    pub server_name: Option<String>,
    /// Which protocol is spoken.
    #[serde(default)]
    pub protocol: DsmProtocol,
    /// Connections open at most.
    #[serde(default = "default_max_connections")]
    pub max_connections: usize,
    /// How long TCP and how long TLS may take to connect.
    #[serde(default = "default_timeout_ms")]
    pub connect_timeout_ms: u64,
    /// How long a request may take until its answer is there as a whole, and how long a free connection is waited for.
    #[serde(default = "default_timeout_ms")]
    pub request_timeout_ms: u64,
}

/// A version of KMIP, or the highest that both sides know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub enum DsmProtocol {
    /// Asked of the server by Discover Versions.
    #[default]
    #[serde(rename = "auto")]
    Auto,
    /// KMIP 1.2.
    #[serde(rename = "1.2")]
    V1_2,
    /// KMIP 1.4.
    #[serde(rename = "1.4")]
    V1_4,
    /// KMIP 2.0.
    #[serde(rename = "2.0")]
    V2_0,
}

impl DsmConnection {
    /// Hosts and ports; `None` for one that cannot be read.
    pub fn addresses(&self) -> Option<Vec<(String, u16)>> {
        self.servers.iter().map(|server| address(server)).collect()
    }

    /// `connect_timeout_ms`.
    pub fn connect_timeout(&self) -> Duration {
        Duration::from_millis(self.connect_timeout_ms)
    }

    /// `request_timeout_ms`.
    pub fn request_timeout(&self) -> Duration {
        Duration::from_millis(self.request_timeout_ms)
    }

    fn rules(&self) -> [(&'static str, bool, &'static str); 5] {
        let is_timeout = |ms: &u64| (100..=60_000).contains(ms);
        [
            ("servers", (1..=16).contains(&self.servers.len()), "1 to 16 servers"),
            (
                "servers",
                self.addresses().is_some(),
                "host:port each, such as \"kms.example.com:5696\" or \"[::1]:5696\"",
            ),
            ("max_connections", (1..=64).contains(&self.max_connections), "1 to 64"),
            ("connect_timeout_ms", is_timeout(&self.connect_timeout_ms), "100 to 60000"),
            ("request_timeout_ms", is_timeout(&self.request_timeout_ms), "100 to 60000"),
        ]
    }
}

/// The first rule that a setting breaks: its dotted name and what is expected.
pub(super) fn broken_rule(
    connections: &BTreeMap<String, DsmConnection>,
    default: Option<&str>,
) -> Option<(String, &'static str)> {
    for (name, connection) in connections {
        if !is_name(name) {
            return Some((format!("dsm.{name}"), "a name of 1 to 64 of a-z 0-9 _ -"));
        }
        if let Some((setting, _, expected)) = connection.rules().into_iter().find(|(_, holds, _)| !holds) {
            return Some((format!("dsm.{name}.{setting}"), expected));
        }
    }
    let is_known = default.is_none_or(|default| connections.contains_key(default));
    (!is_known).then(|| ("dsm_default".into(), "the NAME of one of the tables [dsm.NAME]"))
}

/// Lower case, as environment variables are read; no slash, which ends the name in a key's reference.
fn is_name(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'_' | b'-'))
}

fn address(server: &str) -> Option<(String, u16)> {
    let (host, port) = match server.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']')?;
            host.parse::<std::net::Ipv6Addr>().ok()?;
            (host, if port.is_empty() { None } else { Some(port.strip_prefix(':')?) })
        }
        None => server.split_once(':').map_or((server, None), |(host, port)| (host, Some(port))),
    };
    let is_host = !host.is_empty() && host.len() <= 253 && host.bytes().all(|byte| byte.is_ascii_graphic());
    let port = port.map_or(Some(DEFAULT_PORT), |port| port.parse().ok().filter(|port| *port != 0))?;
    is_host.then(|| (host.to_owned(), port))
}

impl<'de> Deserialize<'de> for DsmProtocol {
    /// From text or a number: an environment variable's `1.4` is read as a number.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Text(String),
            Number(f64),
        }
        let text = match Written::deserialize(deserializer)? {
            Written::Text(text) => text,
            Written::Number(number) => format!("{number:.1}"),
        };
        match text.as_str() {
            "auto" => Ok(Self::Auto),
            "1.2" => Ok(Self::V1_2),
            "1.4" => Ok(Self::V1_4),
            "2.0" => Ok(Self::V2_0),
            _ => Err(serde::de::Error::custom("expected \"auto\", \"1.2\", \"1.4\" or \"2.0\"")),
        }
    }
}

fn default_max_connections() -> usize {
    4
}

fn default_timeout_ms() -> u64 {
    5_000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_hosts_with_or_without_a_port() {
        for (text, host, port) in [
            ("kms.example.com:5697", "kms.example.com", 5697),
            ("kms.example.com", "kms.example.com", 5696),
            ("192.0.2.7:1", "192.0.2.7", 1),
            ("[2001:db8::1]:7", "2001:db8::1", 7),
            ("[::1]", "::1", 5696),
        ] {
            assert_eq!(address(text), Some((host.to_owned(), port)), "{text}");
        }
        for text in ["", ":5696", "h:0", "h:65536", "h:", "h:x", "[::1", "[::1]5696", "[h]:1", "a b:1", "::1"] {
            assert_eq!(address(text), None, "{text}");
        }
    }
}
