//! Which host a call goes to and with whose credentials it is signed. The account and Region of the key choose among
//! what is configured, and nothing else does: a client for any other is never built.

use super::session::Session;
use super::{Call, ErrorKind, timeouts};
use crate::job::KeyArn;
use crate::telemetry::AwsCalls;
use aws_config::SdkConfig;
use aws_credential_types::provider::future::ProvideCredentials as Provided;
use aws_sdk_kms::Client;
use aws_sdk_kms::config::retry::RetryConfig;
use aws_sdk_kms::config::{Config, IdentityCache, ProvideCredentials, Region, SharedCredentialsProvider};
use secrecy::SecretString;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// An account whose keys requests may name, and how it is reached.
#[derive(Clone, Debug)]
pub struct Account {
    /// Such as `aws`.
    pub partition: String,
    /// 12 digits.
    pub account: String,
    /// Names of Regions.
    pub regions: Vec<String>,
    /// The role that is assumed there; `None`: the worker's own credentials are of this account.
    pub role: Option<Role>,
    /// The Region whose STS is asked.
    pub sts_region: String,
    /// AWS's FIPS endpoints.
    pub is_fips: bool,
    /// AWS's dual-stack endpoints.
    pub is_dual_stack: bool,
    /// Endpoints of KMS that are not AWS's own, by Region.
    pub endpoints: BTreeMap<String, String>,
}

/// A role, and what its trust policy asks for.
#[derive(Clone, Debug)]
pub struct Role {
    /// Its ARN.
    pub arn: String,
    /// What its trust policy asks for.
    pub external_id: Option<SecretString>,
    /// What `CloudTrail` calls the session.
    pub session_name: String,
    /// How long a session's credentials are good.
    pub session: Duration,
}

/// Partition, account and Region.
type Place = (String, String, String);

/// The clients of all configured accounts and Regions. As many as are configured, each built when it is first needed.
#[derive(Debug)]
pub(super) struct Accounts {
    places: HashMap<Place, At>,
}

/// An account's Region.
#[derive(Debug)]
struct At {
    of: Arc<Way>,
    client: OnceLock<Client>,
}

/// What all Regions of an account share.
pub(super) struct Way {
    pub(super) account: Account,
    /// Of the account's role, if it has one.
    pub(super) session: Option<Arc<Session>>,
    pub(super) sts: aws_sdk_sts::Client,
    shared: SdkConfig,
    attempt_timeout: Duration,
}

impl Accounts {
    pub(super) fn new(
        shared: &SdkConfig,
        accounts: Vec<Account>,
        attempt_timeout: Duration,
        calls: &AwsCalls<Call, ErrorKind>,
    ) -> Self {
        let ways = accounts.into_iter().map(|account| Arc::new(Way::new(shared, account, attempt_timeout, calls)));
        let places = ways.flat_map(|way| {
            let place = |region: &String| (way.account.partition.clone(), way.account.account.clone(), region.clone());
            let at = |region| (place(region), At { of: Arc::clone(&way), client: OnceLock::new() });
            way.account.regions.iter().map(at).collect::<Vec<_>>()
        });
        Self { places: places.collect() }
    }

    pub(super) fn client(&self, key: &KeyArn) -> Option<&Client> {
        let at = self.at(key)?;
        Some(at.client.get_or_init(|| at.of.client(key.region())))
    }

    pub(super) fn way(&self, key: &KeyArn) -> Option<&Way> {
        self.at(key).map(|at| &*at.of)
    }

    /// The sessions of all roles.
    pub(super) fn sessions(&self) -> impl Iterator<Item = &Arc<Session>> {
        self.places.values().filter_map(|at| at.of.session.as_ref())
    }

    fn at(&self, key: &KeyArn) -> Option<&At> {
        self.places.get(&(key.partition().to_owned(), key.account().to_owned(), key.region().to_owned()))
    }
}

impl Way {
    fn new(shared: &SdkConfig, account: Account, attempt_timeout: Duration, calls: &AwsCalls<Call, ErrorKind>) -> Self {
        let sts = aws_sdk_sts::config::Builder::from(shared)
            .region(Region::new(account.sts_region.clone()))
            .timeout_config(timeouts(attempt_timeout))
            .retry_config(RetryConfig::disabled());
        // Where the settings say nothing, the SDK's own chain may.
        let sts = if account.is_fips { sts.use_fips(true) } else { sts };
        let sts = if account.is_dual_stack { sts.use_dual_stack(true) } else { sts };
        let sts = aws_sdk_sts::Client::from_conf(sts.build());
        let session = account
            .role
            .clone()
            .map(|role| Session::new(role, account.account.clone(), sts.clone(), attempt_timeout, calls.clone()));
        Self { account, session, sts, shared: shared.clone(), attempt_timeout }
    }

    fn client(&self, region: &str) -> Client {
        let config = Config::from(&self.shared)
            .to_builder()
            .region(Region::new(region.to_owned()))
            .timeout_config(timeouts(self.attempt_timeout))
            .retry_config(RetryConfig::disabled());
        let config = if self.account.is_fips { config.use_fips(true) } else { config };
        let config = if self.account.is_dual_stack { config.use_dual_stack(true) } else { config };
        let config = match self.account.endpoints.get(region) {
            Some(url) => config.endpoint_url(url),
            None => config,
        };
        let config = match &self.session {
            // The session is the cache: it knows when to renew, and whom not to keep waiting.
            Some(session) => config
                .credentials_provider(SharedCredentialsProvider::new(OfSession(Arc::clone(session))))
                .identity_cache(IdentityCache::no_cache()),
            None => config,
        };
        Client::from_conf(config.build())
    }
}

impl fmt::Debug for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Way").field("account", &self.account).finish_non_exhaustive()
    }
}

/// Hands a session's credentials to the SDK, which signs with them.
#[derive(Debug)]
struct OfSession(Arc<Session>);

impl ProvideCredentials for OfSession {
    fn provide_credentials<'a>(&'a self) -> Provided<'a>
    where
        Self: 'a,
    {
        Provided::new(async { self.0.credentials().await.map_err(super::CallError::into_credentials_error) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::Metrics;
    use aws_config::BehaviorVersion;
    use aws_credential_types::Credentials;
    use aws_sdk_kms::config::interceptors::BeforeTransmitInterceptorContextRef;
    use aws_sdk_kms::config::{ConfigBag, Intercept, RuntimeComponents};
    use aws_sdk_kms::error::BoxError;
    use std::sync::Mutex;

    fn account(partition: &str, region: &str) -> Account {
        Account {
            partition: partition.into(),
            account: "111122223333".into(),
            regions: vec![region.into()],
            role: None,
            sts_region: region.into(),
            is_fips: false,
            is_dual_stack: false,
            endpoints: BTreeMap::new(),
        }
    }

    fn with_role() -> Account {
        let role = Role {
            arn: "arn:aws:iam::111122223333:role/keyferry".into(),
            external_id: Some("hush-hush".into()),
            session_name: "keyferry".into(),
            session: Duration::from_secs(900),
        };
        Account { role: Some(role), regions: vec!["eu-central-1".into(), "us-east-1".into()], ..account("aws", "") }
    }

    fn accounts(all: Vec<Account>) -> Accounts {
        let shared = SdkConfig::builder()
            .behavior_version(BehaviorVersion::v2026_01_12())
            .credentials_provider(SharedCredentialsProvider::new(Credentials::for_tests()))
            .build();
        Accounts::new(&shared, all, Duration::from_secs(1), &AwsCalls::of(&Metrics::new().unwrap()))
    }

    fn key(partition: &str, account: &str, region: &str) -> KeyArn {
        let id = "031c5703-aaf7-425e-a141-7e0c6f5886ab";
        KeyArn::parse(&format!("arn:{partition}:kms:{region}:{account}:key/{id}")).unwrap()
    }

    /// Notes where a call would go, and lets nothing leave.
    #[derive(Clone, Debug, Default)]
    struct Stop(Arc<Mutex<String>>);

    impl Intercept for Stop {
        fn name(&self) -> &'static str {
            "Stop"
        }

        fn read_before_transmit(
            &self,
            context: &BeforeTransmitInterceptorContextRef<'_>,
            _components: &RuntimeComponents,
            _config: &mut ConfigBag,
        ) -> Result<(), BoxError> {
            *self.0.lock().unwrap() = context.request().uri().to_owned();
            Err("far enough".into())
        }
    }

    /// Where calls of KMS and of STS go.
    async fn hosts(account: Account) -> (String, String) {
        let key = key(&account.partition, &account.account, &account.regions[0]);
        let accounts = accounts(vec![account]);
        let (kms, sts) = (Stop::default(), Stop::default());
        let call = accounts.client(&key).unwrap().describe_key().key_id("x");
        call.customize().interceptor(kms.clone()).send().await.unwrap_err();
        let call = accounts.way(&key).unwrap().sts.get_caller_identity();
        call.customize().interceptor(sts.clone()).send().await.unwrap_err();
        let host = |stop: &Stop| stop.0.lock().unwrap().trim_start_matches("https://").trim_end_matches('/').to_owned();
        (host(&kms), host(&sts))
    }

    #[tokio::test]
    async fn hosts_are_those_of_partition_region_and_switches() {
        let of = |partition: &str, region: &str| account(partition, region);
        for (account, kms, sts) in [
            (of("aws", "eu-central-1"), "kms.eu-central-1.amazonaws.com", "sts.eu-central-1.amazonaws.com"),
            (of("aws-cn", "cn-north-1"), "kms.cn-north-1.amazonaws.com.cn", "sts.cn-north-1.amazonaws.com.cn"),
            (of("aws-us-gov", "us-gov-west-1"), "kms.us-gov-west-1.amazonaws.com", "sts.us-gov-west-1.amazonaws.com"),
            (
                Account { is_fips: true, ..of("aws", "us-east-1") },
                "kms-fips.us-east-1.amazonaws.com",
                "sts-fips.us-east-1.amazonaws.com",
            ),
            (
                Account { is_fips: true, sts_region: "us-east-1".into(), ..of("aws", "eu-central-1") },
                "kms-fips.eu-central-1.amazonaws.com",
                "sts-fips.us-east-1.amazonaws.com",
            ),
            (
                Account { is_dual_stack: true, ..of("aws", "eu-central-1") },
                "kms.eu-central-1.api.aws",
                "sts.eu-central-1.api.aws",
            ),
            (
                Account { is_fips: true, is_dual_stack: true, ..of("aws", "us-east-1") },
                "kms-fips.us-east-1.api.aws",
                "sts-fips.us-east-1.api.aws",
            ),
        ] {
            assert_eq!(hosts(account).await, (kms.to_owned(), sts.to_owned()));
        }
    }

    #[tokio::test]
    async fn an_endpoint_is_for_its_region_alone() {
        let url = "https://vpce-1.kms.eu-central-1.vpce.amazonaws.com";
        let endpoints = BTreeMap::from([("eu-central-1".to_owned(), url.to_owned())]);
        let there = |region: &str| Account { endpoints: endpoints.clone(), ..account("aws", region) };
        assert_eq!(hosts(there("eu-central-1")).await.0, "vpce-1.kms.eu-central-1.vpce.amazonaws.com");
        assert_eq!(hosts(there("us-east-1")).await.0, "kms.us-east-1.amazonaws.com");
    }

    #[test]
    fn only_what_is_configured_has_a_client_and_an_account_has_one_session() {
        let accounts = accounts(vec![with_role(), account("aws-cn", "cn-north-1")]);
        for (partition, account, region, is_known) in [
            ("aws", "111122223333", "eu-central-1", true),
            ("aws", "111122223333", "us-east-1", true),
            ("aws-cn", "111122223333", "cn-north-1", true),
            ("aws", "111122223333", "eu-west-1", false),
            ("aws", "111122223334", "eu-central-1", false),
            ("aws-cn", "111122223333", "eu-central-1", false),
        ] {
            assert_eq!(accounts.client(&key(partition, account, region)).is_some(), is_known, "{account} {region}");
        }
        assert_eq!(accounts.places.len(), 3);
        let sessions: Vec<_> = accounts.sessions().collect();
        assert!(sessions.len() == 2 && Arc::ptr_eq(sessions[0], sessions[1]));
        assert!(!format!("{accounts:?}").contains("hush-hush"));
    }
}
