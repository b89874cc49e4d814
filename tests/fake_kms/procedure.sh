#!/usr/bin/env bash
# Checks the test double from outside, with AWS's own command-line client and OpenSSL, by the procedure that AWS
# publishes for importing key material. What Encrypt, GenerateMac and Sign answer is verified by a third implementation
# that knows nothing but the key material.
#
#   procedure.sh [symmetric] [hmac] [pairs] [roles]     all of them if none is named
#
# Needs: AWS_CLI (the `aws` to run), FAKE_KMS_URL (a running fake-kms), PYTHON (a Python with `cryptography`).
set -euo pipefail

: "${AWS_CLI:?path of the aws command}" "${FAKE_KMS_URL:?URL of a running fake-kms}" "${PYTHON:?python with cryptography}"
export AWS_ACCESS_KEY_ID="${AWS_ACCESS_KEY_ID:-AKIAFAKEKEYFERRY0001}"
export AWS_SECRET_ACCESS_KEY="${AWS_SECRET_ACCESS_KEY:-fake-secret}"
export AWS_DEFAULT_REGION=eu-central-1 AWS_REGION=eu-central-1 AWS_PAGER='' AWS_MAX_ATTEMPTS=1
export AWS_CONFIG_FILE=/dev/null AWS_SHARED_CREDENTIALS_FILE=/dev/null AWS_EC2_METADATA_DISABLED=true
unset AWS_PROFILE AWS_SESSION_TOKEN AWS_ENDPOINT_URL AWS_ENDPOINT_URL_KMS AWS_ENDPOINT_URL_STS

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
umask 077

fail() {
    echo "procedure FAILED: $*" >&2
    exit 1
}
kms() { "$AWS_CLI" --endpoint-url "$FAKE_KMS_URL" --output json kms "$@"; }
value() { kms "$@" --output text; }
same() { # what, expected, seen
    [[ "$2" == "$3" ]] || fail "$1: expected '$2', got '$3'"
}
refused() { # code and text expected in the error, then the command
    local expected=$1
    shift
    if kms "$@" >answer.txt 2>&1; then fail "$* succeeded, expected $expected"; fi
    grep -qF -- "$expected" answer.txt || fail "$*: expected '$expected', got: $(cat answer.txt)"
}
hex() { od -An -v -tx1 "$1" | tr -d ' \n'; }
field() { # file, member: a string member of a JSON answer
    "$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$1" "$2"
}

# Step 2 of AWS's procedure: the wrapping public key and the import token.
parameters() { # key, algorithm, wrapping key spec
    kms get-parameters-for-import --key-id "$1" --wrapping-algorithm "$2" --wrapping-key-spec "$3" >parameters.json
    field parameters.json PublicKey | openssl enc -d -base64 -A -out WrappingPublicKey.bin
    field parameters.json ImportToken | openssl enc -d -base64 -A -out ImportToken.bin
    openssl pkey -pubin -inform DER -in WrappingPublicKey.bin -noout -text >public.txt
    grep -q "Public-Key: (${3#RSA_} bit)" public.txt || fail "the wrapping key is not $3: $(head -1 public.txt)"
    [[ $(wc -c <ImportToken.bin) -gt 1000 ]] || fail "the import token is too short"
}
# Step 3: encrypt the key material.
wrap() { # file with the key material, hash
    openssl pkeyutl -encrypt -in "$1" -out EncryptedKeyMaterial.bin -inkey WrappingPublicKey.bin -keyform DER -pubin \
        -pkeyopt rsa_padding_mode:oaep -pkeyopt "rsa_oaep_md:$2" -pkeyopt "rsa_mgf1_md:$2"
}
# Step 3 for the private key of a pair: it is encrypted under an AES key, and the AES key under the wrapping key.
wrap_pair() { # file with the private key in PKCS#8, hash
    openssl rand -out aes_key.bin 32
    openssl enc -id-aes256-wrap-pad -iv A65959A6 -K "$(hex aes_key.bin)" -in "$1" -out wrapped_material.bin
    wrap aes_key.bin "$2"
    cat wrapped_material.bin >>EncryptedKeyMaterial.bin
}
# Step 4: import the key material.
import() { # key, more parameters
    local key=$1
    shift
    kms import-key-material --key-id "$key" --encrypted-key-material fileb://EncryptedKeyMaterial.bin \
        --import-token fileb://ImportToken.bin "$@"
}
try_import() { # expected refusal, key, more parameters
    local expected=$1 key=$2
    shift 2
    refused "$expected" import-key-material --key-id "$key" \
        --encrypted-key-material fileb://EncryptedKeyMaterial.bin --import-token fileb://ImportToken.bin "$@"
}
forever=(--expiration-model KEY_MATERIAL_DOES_NOT_EXPIRE)
printf 'a secret' >plaintext.bin

symmetric() {
    echo "symmetric key"
    key=$(value create-key --origin EXTERNAL --description procedure --query KeyMetadata.KeyId)
    same "state of a new key" "PendingImport False EXTERNAL None" "$(value describe-key --key-id "$key" \
        --query 'KeyMetadata.[KeyState,Enabled,Origin,ExpirationModel]' | tr '\t' ' ')"
    arn=$(value describe-key --key-id "$key" --query KeyMetadata.Arn)
    refused "$arn is pending import." encrypt --key-id "$key" --plaintext fileb://plaintext.bin

    openssl rand -out material.bin 32
    parameters "$key" RSAES_OAEP_SHA_256 RSA_4096
    wrap material.bin sha256
    try_import "A validTo date must be set if the ExpirationModel is KEY_MATERIAL_EXPIRES" "$key"
    material_id=$(import "$key" "${forever[@]}" --query KeyMaterialId --output text)
    [[ $material_id =~ ^[a-f0-9]{64}$ ]] || fail "KeyMaterialId is '$material_id'"
    same "state after the import" "Enabled True KEY_MATERIAL_DOES_NOT_EXPIRE $material_id" "$(value describe-key \
        --key-id "$arn" --query 'KeyMetadata.[KeyState,Enabled,ExpirationModel,CurrentKeyMaterialId]' | tr '\t' ' ')"
    same "materials" "$material_id CURRENT IMPORTED" "$(value list-key-rotations --key-id "$key" \
        --include-key-material ALL_KEY_MATERIAL \
        --query 'Rotations[].[KeyMaterialId,KeyMaterialState,ImportState]' | tr '\t' ' ')"
    try_import InvalidImportTokenException "$key" "${forever[@]}"

    value encrypt --key-id "$key" --plaintext fileb://plaintext.bin --query CiphertextBlob \
        | openssl enc -d -base64 -A -out ciphertext.bin
    "$PYTHON" - material.bin ciphertext.bin "$material_id" <<'PYTHON'
import sys
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
material, blob = (open(name, "rb").read() for name in sys.argv[1:3])
assert blob[0] == 1, "layout"
assert blob[1:33].hex() == sys.argv[3], "key material id"
assert AESGCM(material).decrypt(blob[33:45], blob[45:], None) == b"a secret", "plaintext"
PYTHON
    same "Decrypt" "a secret" "$(value decrypt --ciphertext-blob fileb://ciphertext.bin --query Plaintext \
        | openssl enc -d -base64 -A)"

    echo "reimport, expiry, rejection"
    parameters "$key" RSAES_OAEP_SHA_1 RSA_3072
    wrap material.bin sha256
    try_import InvalidCiphertextException "$key" "${forever[@]}"
    openssl rand -out other.bin 32
    wrap other.bin sha1
    try_import IncorrectKeyMaterialException "$key" "${forever[@]}"
    head -c 16 material.bin >short.bin
    wrap short.bin sha1
    try_import IncorrectKeyMaterialException "$key" "${forever[@]}"
    wrap material.bin sha1
    valid_to=$(($(date +%s) + 86400))
    same "reimported material" "$material_id" "$(import "$key" --expiration-model KEY_MATERIAL_EXPIRES \
        --valid-to "$valid_to" --query KeyMaterialId --output text)"
    seen=$(value describe-key --key-id "$key" --query KeyMetadata.ValidTo)
    # One version of the client prints seconds, with a fraction, another a date; `date` takes some of the former for a
    # year.
    if [[ ! $seen =~ ^[0-9]+(\.[0-9]+)?$ ]]; then seen=$(date -d "$seen" +%s); fi
    same "ValidTo" "$valid_to" "${seen%.*}"

    echo "new material waits for its rotation"
    parameters "$key" RSAES_OAEP_SHA_256 RSA_2048
    wrap other.bin sha256
    pending_id=$(import "$key" "${forever[@]}" --import-type NEW_KEY_MATERIAL --key-material-description "job 42" \
        --query KeyMaterialId --output text)
    same "materials" "$(printf '%s\n' "$material_id CURRENT None" "$pending_id PENDING_ROTATION job 42")" \
        "$(value list-key-rotations --key-id "$key" --include-key-material ALL_KEY_MATERIAL \
            --query 'Rotations[].[KeyMaterialId,KeyMaterialState,KeyMaterialDescription]' | tr '\t' ' ')"
    parameters "$key" RSAES_OAEP_SHA_256 RSA_2048
    openssl rand -out third.bin 32
    wrap third.bin sha256
    try_import "because another key material (id: $pending_id) is pending rotation." "$key" "${forever[@]}" \
        --import-type NEW_KEY_MATERIAL

    echo "deletion"
    kms delete-imported-key-material --key-id "$key" >/dev/null
    same "state after the deletion" "PendingImport None $material_id" "$(value describe-key --key-id "$key" \
        --query 'KeyMetadata.[KeyState,ExpirationModel,CurrentKeyMaterialId]' | tr '\t' ' ')"
    refused "is pending import." decrypt --key-id "$key" --ciphertext-blob fileb://ciphertext.bin
    wrap material.bin sha256
    import "$key" "${forever[@]}" >/dev/null
    same "Decrypt after the reimport" "a secret" "$(value decrypt --key-id "$key" \
        --ciphertext-blob fileb://ciphertext.bin --query Plaintext | openssl enc -d -base64 -A)"

    echo "rotation"
    kms rotate-key-on-demand --key-id "$key" >/dev/null
    same "rotations" "$pending_id CURRENT ON_DEMAND" "$(value list-key-rotations --key-id "$key" \
        --query 'Rotations[].[KeyMaterialId,KeyMaterialState,RotationType]' | tr '\t' ' ')"
    same "Decrypt after the rotation" "a secret" "$(value decrypt --key-id "$key" \
        --ciphertext-blob fileb://ciphertext.bin --query Plaintext | openssl enc -d -base64 -A)"
    refused "No available key material pending rotation for the key: $arn." rotate-key-on-demand --key-id "$key"

    echo "keys that are not for this caller"
    aws_key=$(value create-key --query KeyMetadata.Arn)
    refused "$aws_key origin is AWS_KMS which is not valid for this operation." get-parameters-for-import \
        --key-id "$aws_key" --wrapping-algorithm RSAES_OAEP_SHA_256 --wrapping-key-spec RSA_4096
    refused "Key 'arn:aws:kms:us-east-1:111122223333:key/$key' does not exist" describe-key \
        --region us-east-1 --key-id "$key"
    kms schedule-key-deletion --key-id "$key" --pending-window-in-days 7 >/dev/null
    refused KMSInvalidStateException get-parameters-for-import --key-id "$key" --wrapping-algorithm RSAES_OAEP_SHA_256 \
        --wrapping-key-spec RSA_4096
    kms cancel-key-deletion --key-id "$key" >/dev/null
    same "state after the cancelled deletion" Disabled "$(value describe-key --key-id "$key" \
        --query KeyMetadata.KeyState)"
    kms enable-key --key-id "$key"
    kms disable-key --key-id "$key"
    refused DisabledException encrypt --key-id "$key" --plaintext fileb://plaintext.bin
    AWS_SECRET_ACCESS_KEY=wrong refused InvalidSignatureException list-keys
    AWS_ACCESS_KEY_ID=AKIAUNKNOWN refused UnrecognizedClientException list-keys
}

hmac() {
    for bits in 224 256 384 512; do
        echo "HMAC_$bits key"
        mac_key=$(value create-key --origin EXTERNAL --key-spec "HMAC_$bits" --key-usage GENERATE_VERIFY_MAC \
            --query KeyMetadata.KeyId)
        openssl rand -out mac.bin $((bits / 8))
        parameters "$mac_key" RSAES_OAEP_SHA_256 RSA_4096
        wrap mac.bin sha256
        if [[ -e token-of-another-key.bin ]]; then
            mv ImportToken.bin good-token.bin
            mv token-of-another-key.bin ImportToken.bin
            try_import InvalidImportTokenException "$mac_key" "${forever[@]}"
            mv good-token.bin ImportToken.bin
        fi
        same "members of the answer" '["KeyId"]' "$(import "$mac_key" "${forever[@]}" | "$PYTHON" -c \
            'import json, sys; print(json.dumps(sorted(json.load(sys.stdin))))')"
        value generate-mac --key-id "$mac_key" --mac-algorithm "HMAC_SHA_$bits" --message fileb://plaintext.bin \
            --query Mac | openssl enc -d -base64 -A -out tag.bin
        same "MAC" "$(openssl dgst -mac HMAC -macopt "hexkey:$(hex mac.bin)" "-sha$bits" \
            -r plaintext.bin | cut -d' ' -f1)" "$(hex tag.bin)"
        same "VerifyMac" True "$(value verify-mac --key-id "$mac_key" --mac-algorithm "HMAC_SHA_$bits" \
            --message fileb://plaintext.bin --mac fileb://tag.bin --query MacValid)"
        if ((bits == 224)); then
            refused KMSInvalidMacException verify-mac --key-id "$mac_key" --mac-algorithm "HMAC_SHA_$bits" \
                --message fileb://mac.bin --mac fileb://tag.bin
            parameters "$mac_key" RSAES_OAEP_SHA_256 RSA_4096
            mv ImportToken.bin token-of-another-key.bin # never used, so that only its key is wrong
        fi
    done
}

pair() { # key spec, hash, signing algorithm, then how OpenSSL makes such a key
    local key spec=$1 hash=$2 algorithm=$3
    shift 3
    echo "$spec key pair"
    key=$(value create-key --origin EXTERNAL --key-spec "$spec" --key-usage SIGN_VERIFY --query KeyMetadata.KeyId)
    openssl genpkey "$@" -out private_key.pem 2>/dev/null
    openssl pkcs8 -topk8 -nocrypt -in private_key.pem -outform DER -out private_key.der
    openssl pkey -in private_key.pem -pubout -out public_key.pem
    openssl pkey -pubin -in public_key.pem -outform DER -out public_key.der
    parameters "$key" "RSA_AES_KEY_WRAP_${hash^^}" RSA_4096
    wrap_pair private_key.der "${hash/_/}"
    same "members of the answer" '["KeyId"]' "$(import "$key" "${forever[@]}" | "$PYTHON" -c \
        'import json, sys; print(json.dumps(sorted(json.load(sys.stdin))))')"
    same "public key" "$(openssl enc -base64 -A -in public_key.der)" \
        "$(value get-public-key --key-id "$key" --query PublicKey)"
    value sign --key-id "$key" --signing-algorithm "$algorithm" --message fileb://plaintext.bin --query Signature \
        | openssl enc -d -base64 -A -out signature.bin
}
pairs() {
    pair RSA_2048 sha_256 RSASSA_PSS_SHA_256 -algorithm RSA -pkeyopt rsa_keygen_bits:2048
    openssl dgst -sha256 -verify public_key.pem -sigopt rsa_padding_mode:pss -sigopt rsa_pss_saltlen:digest \
        -signature signature.bin plaintext.bin >/dev/null || fail "the signature is not the RSA key's"
    pair ECC_NIST_P384 sha_1 ECDSA_SHA_384 -algorithm EC -pkeyopt ec_paramgen_curve:P-384
    openssl dgst -sha384 -verify public_key.pem -signature signature.bin plaintext.bin >/dev/null \
        || fail "the signature is not the P-384 key's"
}

sts() { "$AWS_CLI" --endpoint-url "$FAKE_KMS_URL" --output text sts "$@"; }
roles() {
    local key role=arn:aws:iam::444455556666:role/keyferry
    echo "a role in another account"
    "$PYTHON" - "$FAKE_KMS_URL/_fake/roles" <<PYTHON
import json, sys, urllib.request
role = {"arn": "$role", "trusts": "111122223333", "external_id": "prod-42"}
urllib.request.urlopen(urllib.request.Request(sys.argv[1], json.dumps(role).encode())).read()
PYTHON
    same "who calls" arn:aws:iam::111122223333:user/AKIAFAKEKEYFERRY0001 "$(sts get-caller-identity --query Arn)"
    local assume=(assume-role --role-arn "$role" --role-session-name cli --duration-seconds 900)
    if sts "${assume[@]}" --external-id other >answer.txt 2>&1; then fail "a wrong external id was taken"; fi
    grep -qF "(AccessDenied)" answer.txt || fail "a wrong external id: $(cat answer.txt)"
    read -r AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN < <(sts "${assume[@]}" --external-id prod-42 \
        --query 'Credentials.[AccessKeyId, SecretAccessKey, SessionToken]')
    export AWS_SESSION_TOKEN
    same "whose session" arn:aws:sts::444455556666:assumed-role/keyferry/cli "$(sts get-caller-identity --query Arn)"
    key=$(value create-key --origin EXTERNAL --query KeyMetadata.Arn)
    [[ $key == *:444455556666:* ]] || fail "a key in the wrong account: $key"
    # The own credentials again, of which the key's account knows nothing.
    export AWS_ACCESS_KEY_ID=AKIAFAKEKEYFERRY0001 AWS_SECRET_ACCESS_KEY=fake-secret
    unset AWS_SESSION_TOKEN
    refused AccessDeniedException describe-key --key-id "$key"
}

if (($# == 0)); then set -- symmetric hmac pairs roles; fi
for part; do "$part"; done
echo "procedure ok"
