//! `rabbitmq.url`, read once for everyone who needs a part of it.

use lapin::uri::{AMQPAuthority, AMQPScheme, AMQPUri, AMQPUserInfo};
use secrecy::SecretString;
use url::{Host, Url};

/// Whom RabbitMQ lets in from its own machine alone, and takes where no user is named.
const GUEST: &str = "guest";

/// What lapin takes note of on the way that is used here. Others, as Erlang's client has them for TLS, would be dropped
/// without a word.
const PARAMETERS: [&str; 4] = ["auth_mechanism", "channel_max", "frame_max", "heartbeat"];

/// Seconds between two signs of life where the URL names no other number, and RabbitMQ no smaller one: its own is 60. What
/// gives no sign for twice as long is gone.
const HEARTBEAT: u16 = 20;

/// Bytes of a frame where nothing is consumed. lapin keeps room for 32 frames each way, of 128 KiB with RabbitMQ's default.
const PUBLISHED_FRAME: u32 = 16 * 1024;

/// How the client says who it is (SASL).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mechanism {
    /// User and password.
    Plain,
    /// The certificate of the connection.
    External,
}

impl Mechanism {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Plain => "PLAIN",
            Self::External => "EXTERNAL",
        }
    }
}

/// Host, virtual host, user and password.
pub(super) struct Address {
    /// Without the credentials.
    uri: AMQPUri,
    mechanism: Mechanism,
    user: Option<String>,
    password: Option<SecretString>,
    default_password: SecretString,
}

impl Address {
    /// Reads a URL. The error says what was expected, and nothing of the URL: it may hold a password.
    pub(super) fn parse(text: &str) -> Result<Self, &'static str> {
        const FORM: &str = "amqp://user:password@host:port/vhost, or amqps";
        let url = Url::parse(text).map_err(|_| FORM)?;
        if url.query_pairs().any(|(name, _)| !PARAMETERS.contains(&&*name)) {
            return Err("no other parameters than auth_mechanism, channel_max, frame_max and heartbeat; \
                        certificates are settings of [rabbitmq], and so is connect_timeout_ms");
        }
        let mechanism = url.query_pairs().find(|(name, _)| name == "auth_mechanism");
        let mechanism = match mechanism.map(|(_, value)| value.to_lowercase()).as_deref() {
            None | Some("plain") => Mechanism::Plain,
            Some("external") => Mechanism::External,
            Some(_) => return Err("auth_mechanism=plain or auth_mechanism=external"),
        };
        let mut uri: AMQPUri = text.parse().map_err(|_| FORM)?;
        // lapin takes an IPv6 address for no host at all, and connects to localhost instead.
        let host = match url.host().ok_or(FORM)? {
            Host::Ipv6(address) => address.to_string(),
            Host::Ipv4(address) => address.to_string(),
            Host::Domain(_) => uri.authority.host,
        };
        let AMQPUserInfo { username, password } = uri.authority.userinfo;
        uri.authority = AMQPAuthority {
            userinfo: AMQPUserInfo { username: String::new(), password: String::new() },
            host,
            port: uri.authority.port,
        };
        // A virtual host without a name cannot be made by any of RabbitMQ's tools; the default one is meant.
        if uri.vhost.is_empty() {
            "/".clone_into(&mut uri.vhost);
        }
        uri.query.heartbeat.get_or_insert(HEARTBEAT);
        Ok(Self {
            uri,
            mechanism,
            user: (!url.username().is_empty()).then_some(username),
            password: url.password().map(|_| SecretString::from(password)),
            default_password: SecretString::from(GUEST),
        })
    }

    /// For lapin.
    pub(super) fn uri(&self) -> AMQPUri {
        self.uri.clone()
    }

    /// The same for a connection that consumes nothing: a body is split into frames, and so is what comes back of it. Where
    /// others' messages are consumed the broker's own size is needed, since no header is split.
    pub(super) fn uri_to_publish(&self) -> AMQPUri {
        let mut uri = self.uri();
        let asked = uri.query.frame_max.filter(|bytes| *bytes > 0);
        uri.query.frame_max = Some(asked.map_or(PUBLISHED_FRAME, |bytes| bytes.min(PUBLISHED_FRAME)));
        uri
    }

    pub(super) fn host(&self) -> &str {
        &self.uri.authority.host
    }

    pub(super) fn vhost(&self) -> &str {
        &self.uri.vhost
    }

    pub(super) fn is_tls(&self) -> bool {
        self.uri.scheme == AMQPScheme::AMQPS
    }

    pub(super) fn mechanism(&self) -> Mechanism {
        self.mechanism
    }

    pub(super) fn has_user(&self) -> bool {
        self.user.is_some()
    }

    pub(super) fn user(&self) -> &str {
        self.user.as_deref().unwrap_or(GUEST)
    }

    pub(super) fn has_password(&self) -> bool {
        self.password.is_some()
    }

    pub(super) fn password(&self) -> &SecretString {
        self.password.as_ref().unwrap_or(&self.default_password)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use secrecy::ExposeSecret as _;

    #[test]
    fn every_part_of_a_url_is_read() {
        let address = Address::parse("amqps://us%40er:p%2Fw@mq.example.com:1/a%2fb?heartbeat=7").unwrap();
        assert_eq!((address.host(), address.vhost(), address.user()), ("mq.example.com", "a/b", "us@er"));
        assert_eq!(address.password().expose_secret(), "p/w");
        assert!(address.is_tls() && address.mechanism() == Mechanism::Plain);
        assert_eq!((address.uri().authority.port, address.uri().query.heartbeat), (1, Some(7)));
        let frames = |url: &str| Address::parse(url).unwrap().uri_to_publish().query.frame_max;
        assert_eq!(
            ["", "?frame_max=0", "?frame_max=131072"].map(|more| frames(&format!("amqp://h{more}"))),
            [Some(16_384); 3]
        );
        assert_eq!(frames("amqp://h?frame_max=8192"), Some(8_192));
        // What is handed to lapin, which prints it in traces, knows no secret.
        assert!(!format!("{:?}", address.uri()).contains("p/w"));
    }

    #[test]
    fn what_is_left_out_has_a_default() {
        for (url, port, vhost) in [
            ("amqp://h", 5672, "/"),
            ("amqp://h/", 5672, "/"),
            ("amqp://h/%2f", 5672, "/"),
            ("amqps://h/kf-1", 5671, "kf-1"),
        ] {
            let address = Address::parse(url).unwrap();
            assert_eq!((address.uri().authority.port, address.vhost()), (port, vhost), "{url}");
            assert!(!address.has_user() && !address.has_password());
            assert_eq!(address.uri().query.heartbeat, Some(HEARTBEAT), "the broker's own is 60");
            assert_eq!((address.user(), address.password().expose_secret()), ("guest", "guest"));
        }
    }

    #[test]
    fn an_ipv6_address_is_a_host() {
        let address = Address::parse("amqps://[2001:db8::1]:7/").unwrap();
        assert_eq!((address.host(), address.uri().authority.port), ("2001:db8::1", 7));
    }

    #[test]
    fn a_url_that_does_not_say_what_it_seems_to_is_refused() {
        for url in ["", "mq", "http://h", "amqp:h", "amqps://h?cacertfile=ca.pem", "amqp://h?auth_mechanism=anonymous"]
        {
            assert!(Address::parse(url).is_err(), "{url}");
        }
        assert_eq!(Address::parse("amqps://h/v?auth_mechanism=EXTERNAL").unwrap().mechanism(), Mechanism::External);
    }
}
