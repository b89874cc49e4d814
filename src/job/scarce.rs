//! AWS operations with a quota so small that all workers share it out.

words! {
    #[derive(PartialOrd, Ord)]
    /// An operation whose calls are governed: by AWS's defaults 100/s or fewer for an account and Region.
    pub Scarce {
        /// Read-only.
        GetParametersForImport = "GetParametersForImport",
        /// Changes the key.
        ImportKeyMaterial = "ImportKeyMaterial",
        /// Changes the key.
        DeleteImportedKeyMaterial = "DeleteImportedKeyMaterial",
        /// Changes the key.
        RotateKeyOnDemand = "RotateKeyOnDemand",
        /// Read-only.
        ListKeyRotations = "ListKeyRotations",
    }
}

impl Scarce {
    /// Calls a second that AWS allows an account and Region by default (AWS KMS Developer Guide, "Request quotas").
    pub fn default_rate(self) -> f64 {
        match self {
            Self::GetParametersForImport => 1.0,
            Self::ImportKeyMaterial | Self::DeleteImportedKeyMaterial => 15.0,
            Self::RotateKeyOnDemand => 5.0,
            Self::ListKeyRotations => 100.0,
        }
    }

    /// By AWS's name.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|operation| operation.as_str() == text)
    }
}
