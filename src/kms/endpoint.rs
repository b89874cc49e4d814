//! Endpoints that the environment or a profile names in the place of AWS's own.
//!
//! Whoever is on the way to one over plain http can answer `GetParametersForImport` with a public key of his own, and so learns
//! every key that is imported; of STS's answers he learns the credentials of every role.

use aws_config::SdkConfig;
use aws_types::service_config::ServiceConfigKey;
use std::net::IpAddr;
use url::{Host, Url};

/// Whether calls must be encrypted on their way to another machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// They must.
    Required,
    /// For a fake KMS on a network of its own.
    Optional,
}

/// An endpoint to which nothing may be sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the endpoint of {service} ({url}) is another machine and not https: whoever is on the way would learn every key that is \
     imported; mend AWS_ENDPOINT_URL, AWS_ENDPOINT_URL_{service} or the profile's endpoint_url, or, for a fake KMS on a network \
     of its own, set worker.allow_aws_over_http"
)]
pub struct PlainEndpoint {
    service: &'static str,
    /// Without user, path and query.
    url: String,
}

/// Where calls of KMS and STS go, but for what the settings say of a target.
pub(super) fn judge(shared: &SdkConfig, encryption: Encryption) -> Result<(), PlainEndpoint> {
    if encryption == Encryption::Optional {
        return Ok(());
    }
    for service in ["KMS", "STS"] {
        if let Some(url) = configured(shared, service)
            && !is_safe(&url)
        {
            return Err(PlainEndpoint { service, url: shown(&url) });
        }
    }
    Ok(())
}

/// As the SDK's clients look it up: that of the service, else that of all.
fn configured(shared: &SdkConfig, service: &str) -> Option<String> {
    let key = ServiceConfigKey::builder().service_id(service).env("AWS_ENDPOINT_URL").profile("endpoint_url").build();
    let own = key.ok().and_then(|key| shared.service_config()?.load_config(key));
    own.or_else(|| shared.endpoint_url().map(str::to_owned))
}

fn is_safe(url: &str) -> bool {
    let Ok(url) = Url::parse(url) else { return false };
    let is_here = match url.host() {
        Some(Host::Ipv4(address)) => IpAddr::from(address).is_loopback(),
        Some(Host::Ipv6(address)) => IpAddr::from(address).is_loopback(),
        Some(Host::Domain(name)) => name == "localhost",
        None => false,
    };
    url.scheme() == "https" || is_here
}

fn shown(url: &str) -> String {
    match Url::parse(url) {
        Ok(url) => format!("{}://{}", url.scheme(), url.host_str().unwrap_or_default()),
        Err(_) => "no URL".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(url: &str, encryption: Encryption) -> Result<(), PlainEndpoint> {
        judge(&SdkConfig::builder().endpoint_url(url).build(), encryption)
    }

    #[test]
    fn plain_http_is_for_this_machine() {
        for url in ["https://kms.example", "http://127.0.0.1:4599", "http://[::1]:4599", "http://localhost:4599"] {
            assert_eq!(judged(url, Encryption::Required), Ok(()), "{url}");
        }
        for url in ["http://fake-kms:4599", "http://10.0.0.7", "http://127.0.0.1.example", "HTTP://kms.example", "kms"]
        {
            assert!(judged(url, Encryption::Required).is_err(), "{url}");
            assert_eq!(judged(url, Encryption::Optional), Ok(()), "{url}");
        }
        let told = judged("http://user:s3cret@kms.example/s3cret", Encryption::Required).unwrap_err().to_string();
        assert!(told.contains("http://kms.example") && !told.contains("s3cret"), "{told}");
        assert_eq!(judge(&SdkConfig::builder().build(), Encryption::Required), Ok(()));
    }
}
