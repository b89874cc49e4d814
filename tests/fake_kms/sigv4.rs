//! AWS Signature Version 4, from the server's side.
//!
//! Verified for real, so that a client with a wrong secret, Region, clock or a body changed on the way fails here as it
//! would fail at AWS. The clock is the machine's, not the double's own: moving the double's clock must not invalidate
//! the client's signatures.

use std::borrow::Cow;

use axum::http::HeaderMap;
use time::{Duration, OffsetDateTime, PrimitiveDateTime};

use crate::crypto::{hmac_sha256, sha256};
use crate::refusal::Refusal;

/// What of a request is signed.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// HTTP method.
    pub method: &'a str,
    /// Path as sent; KMS knows `/` only, so nothing is normalised.
    pub path: &'a str,
    /// Query string as sent, without the question mark.
    pub query: &'a str,
    /// All headers.
    pub headers: &'a HeaderMap,
    /// The body.
    pub body: &'a [u8],
}

/// What the `Authorization` header says.
#[derive(Debug, PartialEq, Eq)]
pub struct Claim<'a> {
    /// The access key's id.
    pub access_key: &'a str,
    /// The Region of the credential's scope, which is the Region the call is for.
    pub region: &'a str,
    date: &'a str,
    service: &'a str,
    signed_headers: &'a str,
    signature: &'a str,
}

impl<'a> Claim<'a> {
    /// Reads the `Authorization` header. Nothing in it is to be believed before [`Claim::verify`].
    pub fn read(headers: &'a HeaderMap) -> Result<Self, Refusal> {
        let header = headers
            .get("authorization")
            .ok_or_else(|| Refusal::new("MissingAuthenticationTokenException", "Missing Authentication Token"))?
            .to_str()
            .map_err(|_| incomplete())?;
        let rest = header.strip_prefix(ALGORITHM).ok_or_else(incomplete)?;
        let (mut credential, mut signed_headers, mut signature) = (None, None, None);
        for part in rest.split(',') {
            match part.trim().split_once('=') {
                Some(("Credential", value)) => credential = Some(value),
                Some(("SignedHeaders", value)) => signed_headers = Some(value),
                Some(("Signature", value)) => signature = Some(value),
                _ => return Err(incomplete()),
            }
        }
        let mut scope = credential.ok_or_else(incomplete)?.split('/');
        let mut next = || scope.next().filter(|part| !part.is_empty()).ok_or_else(incomplete);
        let (access_key, date, region, service, end) = (next()?, next()?, next()?, next()?, next()?);
        if end != "aws4_request" || scope.next().is_some() {
            return Err(incomplete());
        }
        Ok(Self {
            access_key,
            region,
            date,
            service,
            signed_headers: signed_headers.ok_or_else(incomplete)?,
            signature: signature.ok_or_else(incomplete)?,
        })
    }

    /// Whether the request was signed with this secret, for this service, and within `life` of `now`.
    pub fn verify(
        &self,
        request: Request<'_>,
        service: &str,
        secret: &str,
        now: OffsetDateTime,
        life: Duration,
    ) -> Result<(), Refusal> {
        let timestamp = text(request.headers, "x-amz-date").ok_or_else(incomplete)?;
        if self.service != service {
            return Err(invalid_signature(format!("Credential should be scoped to correct service: '{service}'.")));
        }
        if !timestamp.starts_with(self.date) {
            return Err(invalid_signature(
                "Date in Credential scope does not match YYYYMMDD from ISO-8601 version of date from HTTP",
            ));
        }
        let signed: Vec<_> = self.signed_headers.split(';').collect();
        // A signature that leaves these out does not bind what matters; two of them are not in every request.
        let is_sent = |name: &&str| ["host", "x-amz-date"].contains(name) || request.headers.contains_key(*name);
        let binding = ["host", "x-amz-date", "x-amz-target", "x-amz-security-token"];
        if binding.iter().filter(|name| is_sent(name)).any(|name| !signed.contains(name)) {
            return Err(invalid_signature(
                "'Host', 'X-Amz-Date', 'X-Amz-Target' and 'X-Amz-Security-Token' must be signed headers.",
            ));
        }
        check_age(timestamp, now, life)?;
        let expected = self.signature(request, timestamp, secret);
        if expected != self.signature {
            return Err(invalid_signature(
                "The request signature we calculated does not match the signature you provided. Check your AWS Secret Access Key and signing method. Consult the service documentation for details.",
            ));
        }
        Ok(())
    }

    fn signature(&self, request: Request<'_>, timestamp: &str, secret: &str) -> String {
        let canonical = canonical_request(request, self.signed_headers);
        let to_sign = format!(
            "{ALGORITHM}\n{timestamp}\n{}/{}/{}/aws4_request\n{}",
            self.date,
            self.region,
            self.service,
            hex::encode(sha256(&[canonical.as_bytes()]))
        );
        let mut key = hmac_sha256(format!("AWS4{secret}").as_bytes(), self.date.as_bytes());
        for part in [self.region, self.service, "aws4_request", &to_sign] {
            key = hmac_sha256(key.as_ref(), part.as_bytes());
        }
        hex::encode(key)
    }
}

/// The refusal of an access key that does not exist.
pub fn unknown_access_key() -> Refusal {
    Refusal::new("UnrecognizedClientException", "The security token included in the request is invalid.")
}

const ALGORITHM: &str = "AWS4-HMAC-SHA256";

fn incomplete() -> Refusal {
    Refusal::new(
        "IncompleteSignatureException",
        "Authorization header requires 'Credential', 'Signature' and 'SignedHeaders' parameters, and existence of an 'X-Amz-Date' header.",
    )
}

fn invalid_signature(message: impl Into<String>) -> Refusal {
    Refusal::new("InvalidSignatureException", message)
}

fn check_age(timestamp: &str, now: OffsetDateTime, life: Duration) -> Result<(), Refusal> {
    let format = time::macros::format_description!("[year][month][day]T[hour][minute][second]Z");
    let signed_at = PrimitiveDateTime::parse(timestamp, &format).map_err(|_| incomplete())?.assume_utc();
    let print = |at: OffsetDateTime| at.format(&format).unwrap_or_default();
    let minutes = life.whole_minutes();
    if signed_at < now - life {
        return Err(invalid_signature(format!(
            "Signature expired: {timestamp} is now earlier than {} ({} - {minutes} min.)",
            print(now - life),
            print(now)
        )));
    }
    if signed_at > now + life {
        return Err(invalid_signature(format!(
            "Signature not yet current: {timestamp} is still later than {} ({} + {minutes} min.)",
            print(now + life),
            print(now)
        )));
    }
    Ok(())
}

fn canonical_request(request: Request<'_>, signed_headers: &str) -> String {
    let mut canonical = format!("{}\n{}\n{}\n", request.method, request.path, canonical_query(request.query));
    for name in signed_headers.split(';') {
        canonical.push_str(name);
        canonical.push(':');
        for (index, value) in request.headers.get_all(name).iter().enumerate() {
            if index > 0 {
                canonical.push(',');
            }
            let value = String::from_utf8_lossy(value.as_bytes());
            for (index, word) in value.split_ascii_whitespace().enumerate() {
                if index > 0 {
                    canonical.push(' ');
                }
                canonical.push_str(word);
            }
        }
        canonical.push('\n');
    }
    canonical.push('\n');
    canonical.push_str(signed_headers);
    canonical.push('\n');
    canonical.push_str(&hex::encode(sha256(&[request.body])));
    canonical
}

fn canonical_query(query: &str) -> String {
    let mut pairs: Vec<(Cow<'_, str>, Cow<'_, str>)> = query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (Cow::Borrowed(name), Cow::Borrowed(value))
        })
        .collect();
    pairs.sort();
    let pairs: Vec<_> = pairs.into_iter().map(|(name, value)| format!("{name}={value}")).collect();
    pairs.join("&")
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use axum::http::{HeaderName, HeaderValue};
    use time::macros::datetime;

    use super::*;

    const ACCESS_KEY: &str = "AKIDEXAMPLE";
    const SECRET: &str = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";
    const TIMESTAMP: &str = "20150830T123600Z";

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.append("host", HeaderValue::from_static("example.amazonaws.com"));
        headers.append("x-amz-date", HeaderValue::from_static(TIMESTAMP));
        for (name, value) in pairs {
            headers.append(HeaderName::from_static(name), HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    fn claim<'a>(service: &'a str, signed_headers: &'a str) -> Claim<'a> {
        Claim { access_key: ACCESS_KEY, region: "us-east-1", date: "20150830", service, signed_headers, signature: "" }
    }

    /// AWS's own signing test suite, as carried by its Rust and C libraries.
    #[test]
    fn the_published_vectors_are_met() {
        let vector = |method, query, extra: &[(&'static str, &str)], signed: &str, body: &[u8], signature: &str| {
            let headers = headers(extra);
            let request = Request { method, path: "/", query, headers: &headers, body };
            assert_eq!(claim("service", signed).signature(request, TIMESTAMP, SECRET), signature);
        };
        let vanilla = "host;x-amz-date";
        // get-vanilla
        vector("GET", "", &[], vanilla, b"", "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31");
        // post-vanilla
        vector("POST", "", &[], vanilla, b"", "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b");
        // get-vanilla-query-order-key-case
        let query = "Param2=value2&Param1=value1";
        vector("GET", query, &[], vanilla, b"", "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500");
        // get-header-value-trim
        let trim = [("my-header1", " value1"), ("my-header2", " \"a   b   c\"")];
        let signed = "host;my-header1;my-header2;x-amz-date";
        vector("GET", "", &trim, signed, b"", "acc3ed3afb60bb290fc8d2dd0098b9911fcaa05412b367055dee359757a9c736");
        // get-header-key-duplicate
        let duplicate = [("my-header1", "value2"), ("my-header1", "value2"), ("my-header1", "value1")];
        let signed = "host;my-header1;x-amz-date";
        vector("GET", "", &duplicate, signed, b"", "c9d5ea9f3f72853aea855b47ea873832890dbdd183b4468f858259531a5138ea");
        // post-x-www-form-urlencoded
        let form = [
            ("content-type", "application/x-www-form-urlencoded"),
            ("content-length", "13"),
            ("x-amz-content-sha256", "9095672bbd1f56dfc5b65f3e153adc8731a4a654192329106275f4c7b24d0b6e"),
        ];
        let signed = "content-length;content-type;host;x-amz-content-sha256;x-amz-date";
        let signature = "d3875051da38690788ef43de4db0d8f280229d82040bfac253562e56c3f20e0b";
        vector("POST", "", &form, signed, b"Param1=value1", signature);
    }

    #[test]
    fn a_changed_body_secret_region_or_clock_is_refused() {
        let headers = headers(&[("x-amz-target", "TrentService.ListKeys")]);
        let request = Request { method: "POST", path: "/", query: "", headers: &headers, body: b"{}" };
        let signed = "host;x-amz-date;x-amz-target";
        let signature = claim("kms", signed).signature(request, TIMESTAMP, SECRET);
        let now = datetime!(2015-08-30 12:36:00 UTC);
        let life = Duration::minutes(5);
        let code = |claim: Claim<'_>, request, secret, now| {
            claim.verify(request, "kms", secret, now, life).map_err(|refusal| refusal.code.into_owned())
        };
        let good = || Claim { signature: &signature, ..claim("kms", signed) };
        let refused = Err("InvalidSignatureException".to_owned());

        assert_eq!(code(good(), request, SECRET, now), Ok(()));
        assert_eq!(code(good(), Request { body: b"{} ", ..request }, SECRET, now), refused);
        assert_eq!(code(good(), request, "other", now), refused);
        assert_eq!(code(Claim { region: "eu-central-1", ..good() }, request, SECRET, now), refused);
        assert_eq!(code(Claim { service: "sqs", ..good() }, request, SECRET, now), refused);
        assert_eq!(code(Claim { signed_headers: "host", ..good() }, request, SECRET, now), refused);
        assert_eq!(code(good(), request, SECRET, now + Duration::seconds(300)), Ok(()));
        assert_eq!(code(good(), request, SECRET, now + Duration::seconds(301)), refused);
        assert_eq!(code(good(), request, SECRET, now - Duration::seconds(301)), refused);
        let expired = good().verify(request, "kms", SECRET, now + Duration::seconds(301), life).unwrap_err();
        assert_eq!(
            expired.message,
            "Signature expired: 20150830T123600Z is now earlier than 20150830T123601Z (20150830T124101Z - 5 min.)"
        );
    }

    #[test]
    fn a_damaged_header_is_refused() {
        let read = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.append("authorization", HeaderValue::from_str(value).unwrap());
            Claim::read(&headers).map(|claim| claim.region.to_owned()).map_err(|refusal| refusal.code.into_owned())
        };
        let good = "AWS4-HMAC-SHA256 Credential=A/20150830/us-east-1/kms/aws4_request, SignedHeaders=host, Signature=0";
        assert_eq!(read(good), Ok("us-east-1".to_owned()));
        assert_eq!(read("Bearer x"), Err("IncompleteSignatureException".to_owned()));
        assert_eq!(read(&good.replace("/kms", "")), Err("IncompleteSignatureException".to_owned()));
        assert_eq!(Claim::read(&HeaderMap::new()).unwrap_err().code, "MissingAuthenticationTokenException");
    }
}
