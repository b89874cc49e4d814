//! What `DescribeKey` says of a key, in our types, and its echo for the result.

use super::taken::{MOST_ENTRIES, is_bounded, material_id};
use crate::job::{Expiry, KeyArn, rfc3339};
use aws_sdk_kms::primitives::DateTime;
use aws_sdk_kms::types::{
    ExpirationModelType, KeyManagerType, KeyMetadata, MultiRegionConfiguration, MultiRegionKey, MultiRegionKeyType,
    OriginType,
};
use serde_json::{Map, Value, json};
use time::OffsetDateTime;

/// What a key is among the Regions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegionRole {
    /// It lives in one Region.
    Single,
    /// The primary of a multi-Region key: new material comes in here.
    Primary,
    /// A replica: it takes only material that its primary was given (`ImportKeyMaterial`).
    Replica,
}

/// All keys of a multi-Region key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Regions {
    /// New material comes in here.
    pub primary: KeyArn,
    /// Each takes what the primary was given, in its own Region.
    pub replicas: Vec<KeyArn>,
}

impl Regions {
    /// `None`: AWS does not name them as its documentation promises. They differ from the key in their Region only: no
    /// other key may be touched in its name.
    fn of(configuration: &MultiRegionConfiguration, key: &KeyArn) -> Option<Self> {
        let arn = |other: &MultiRegionKey| {
            KeyArn::parse(other.arn()?).ok().filter(|other| other.order_key() == key.order_key())
        };
        let replicas = configuration.replica_keys();
        if replicas.len() > MOST_ENTRIES {
            return None;
        }
        Some(Self {
            primary: arn(configuration.primary_key()?)?,
            replicas: replicas.iter().map(arn).collect::<Option<_>>()?,
        })
    }
}

/// A KMS key as AWS shows it.
#[derive(Clone, Debug)]
pub struct KeyDescription {
    /// AWS's `Origin`.
    pub origin: String,
    /// Whether the origin is `EXTERNAL`.
    pub is_external: bool,
    /// Whether the key is the customer's own.
    pub is_customer_managed: bool,
    /// AWS's `KeySpec`.
    pub key_spec: String,
    /// AWS's `KeyState`.
    pub state: String,
    /// Its place among the Regions.
    pub role: RegionRole,
    /// The primary's ARN and those of its replicas; of a key that lives in one Region none.
    pub regions: Option<Regions>,
    /// The current material's id; symmetric keys that have or had material.
    pub current_material: Option<String>,
    /// `None`: the key holds no material now.
    pub expiry: Option<Expiry>,
    /// AWS's metadata with AWS's capitals, as the original call's `aws_param`.
    pub aws_param: Value,
}

impl KeyDescription {
    /// The error names a field that is not as AWS's documentation promises.
    pub(super) fn of(metadata: &KeyMetadata, key: &KeyArn) -> Result<Self, String> {
        let text = |value: Option<&str>| value.unwrap_or_default().to_owned();
        let aws_param = aws_param(metadata);
        if let Some((name, _)) = aws_param.iter().find(|(_, value)| !is_bounded(value)) {
            return Err(name.clone());
        }
        let regions =
            metadata.multi_region_configuration().map(|all| Regions::of(all, key).ok_or("MultiRegionConfiguration"));
        let current = metadata.current_key_material_id();
        Ok(Self {
            origin: text(metadata.origin.as_ref().map(OriginType::as_str)),
            is_external: metadata.origin == Some(OriginType::External),
            is_customer_managed: metadata.key_manager == Some(KeyManagerType::Customer),
            key_spec: text(metadata.key_spec.as_ref().map(aws_sdk_kms::types::KeySpec::as_str)),
            state: text(metadata.key_state.as_ref().map(aws_sdk_kms::types::KeyState::as_str)),
            role: match metadata.multi_region_configuration().and_then(|regions| regions.multi_region_key_type()) {
                Some(MultiRegionKeyType::Primary) => RegionRole::Primary,
                Some(MultiRegionKeyType::Replica) => RegionRole::Replica,
                _ => RegionRole::Single,
            },
            regions: regions.transpose()?,
            current_material: current.map(|id| material_id(id).ok_or("CurrentKeyMaterialId")).transpose()?,
            expiry: expiry(metadata.expiration_model.as_ref(), metadata.valid_to),
            aws_param: Value::Object(aws_param),
        })
    }

    /// Whether the key shows that it holds, or has held, material. A key without material ids shows
    /// nothing once its material was deleted; AWS alone knows then.
    pub fn has_had_material(&self) -> bool {
        self.current_material.is_some() || self.expiry.is_some()
    }
}

/// AWS's two fields as one; `None` when there is no material.
pub(super) fn expiry(model: Option<&ExpirationModelType>, valid_to: Option<DateTime>) -> Option<Expiry> {
    match (model, valid_to.and_then(to_time)) {
        (Some(ExpirationModelType::KeyMaterialDoesNotExpire), _) => Some(Expiry::Never),
        (Some(ExpirationModelType::KeyMaterialExpires), Some(at)) => Some(Expiry::At(at)),
        _ => None,
    }
}

/// Whole seconds, the precision in which we send and compare.
pub(super) fn to_time(at: DateTime) -> Option<OffsetDateTime> {
    OffsetDateTime::from_unix_timestamp(at.secs()).ok()
}

/// Every text of the metadata that is used at all.
fn aws_param(metadata: &KeyMetadata) -> Map<String, Value> {
    let mut fields = Map::new();
    let mut put = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            fields.insert(name.to_owned(), value);
        }
    };
    put("AWSAccountId", metadata.aws_account_id.as_deref().map(Value::from));
    put("Arn", metadata.arn.as_deref().map(Value::from));
    put("CustomerMasterKeySpec", metadata.key_spec.as_ref().map(|spec| json!(spec.as_str())));
    put("KeySpec", metadata.key_spec.as_ref().map(|spec| json!(spec.as_str())));
    put("Enabled", Some(json!(metadata.enabled)));
    let algorithms = |names: Vec<&str>| (!names.is_empty()).then(|| json!(names));
    put(
        "EncryptionAlgorithms",
        algorithms(
            metadata.encryption_algorithms().iter().map(aws_sdk_kms::types::EncryptionAlgorithmSpec::as_str).collect(),
        ),
    );
    put(
        "MacAlgorithms",
        algorithms(metadata.mac_algorithms().iter().map(aws_sdk_kms::types::MacAlgorithmSpec::as_str).collect()),
    );
    put("KeyID", Some(json!(metadata.key_id)));
    put("KeyManager", metadata.key_manager.as_ref().map(|manager| json!(manager.as_str())));
    put("KeyState", metadata.key_state.as_ref().map(|state| json!(state.as_str())));
    put("KeyUsage", metadata.key_usage.as_ref().map(|usage| json!(usage.as_str())));
    put("Origin", metadata.origin.as_ref().map(|origin| json!(origin.as_str())));
    put("CreationDate", metadata.creation_date.and_then(to_time).map(|at| json!(rfc3339(at))));
    put("ValidTo", metadata.valid_to.and_then(to_time).map(|at| json!(rfc3339(at))));
    put("ExpirationModel", metadata.expiration_model.as_ref().map(|model| json!(model.as_str())));
    put("CurrentKeyMaterialId", metadata.current_key_material_id.as_deref().map(Value::from));
    put(
        "SigningAlgorithms",
        algorithms(
            metadata.signing_algorithms().iter().map(aws_sdk_kms::types::SigningAlgorithmSpec::as_str).collect(),
        ),
    );
    put(
        "KeyAgreementAlgorithms",
        algorithms(
            metadata
                .key_agreement_algorithms()
                .iter()
                .map(aws_sdk_kms::types::KeyAgreementAlgorithmSpec::as_str)
                .collect(),
        ),
    );
    put("MultiRegion", metadata.multi_region.map(Value::from));
    let regions = metadata.multi_region_configuration();
    put("MultiRegionKeyType", regions.and_then(|of| of.multi_region_key_type()).map(|of| json!(of.as_str())));
    fields
}
