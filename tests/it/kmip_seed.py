"""Registers the objects that the tests of the dsm tier ask for, and writes what they hold to DIR/seed.json.

    python kmip_seed.py PORT DIR

All of it is made anew for one run of the tests and protects nothing.
"""

import json
import os
import pathlib
import secrets
import sys

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from kmip.core import enums
from kmip.core.enums import CryptographicAlgorithm as Algorithm
from kmip.core.enums import CryptographicUsageMask as Usage
from kmip.core.enums import KeyFormatType as Format
from kmip.pie import objects
from kmip.pie.client import ProxyKmipClient

PORT, DIR = int(sys.argv[1]), pathlib.Path(sys.argv[2])

CRYPT = [Usage.ENCRYPT, Usage.DECRYPT]
MAC = [Usage.MAC_GENERATE, Usage.MAC_VERIFY]


def client(name):
    return ProxyKmipClient(
        hostname="127.0.0.1", port=PORT, ca=str(DIR / "ca.crt"), cert=str(DIR / f"{name}.crt"), key=str(DIR / f"{name}.key"),
        ssl_version="PROTOCOL_TLSv1_2", config_file=os.devnull, kmip_version=enums.KMIPVersion.KMIP_1_2,
    )


def encoded(key, form):
    return key.private_bytes(Encoding.DER, form, NoEncryption())


class Seed:
    def __init__(self, kmip):
        self.kmip = kmip
        self.made = {}

    def register(self, label, thing, holds, activate=True, name=None):
        """Under its label as a name, unless another is given; `holds` is what has to come out."""
        if name is not None:
            thing.names = [name]
        identifier = self.kmip.register(thing)
        if activate:
            self.kmip.activate(identifier)
        self.made[label] = {"id": identifier, "holds": holds.hex()}
        return identifier

    def secret(self, label, algorithm, size, masks, **further):
        value = secrets.token_bytes(size)
        key = objects.SymmetricKey(algorithm, size * 8, value, masks, name=label)
        return self.register(label, key, value, **further)

    def pair(self, label, algorithm, bits, value, form, pkcs8, masks=(Usage.SIGN,), **further):
        key = objects.PrivateKey(algorithm, bits, value, form, list(masks), name=label)
        return self.register(label, key, pkcs8, **further)


def secrets_and_pairs(seed):
    seed.secret("aes-256", Algorithm.AES, 32, CRYPT)
    seed.secret("aes-128", Algorithm.AES, 16, CRYPT)
    for name, algorithm, size in [
        ("hmac-224", Algorithm.HMAC_SHA224, 28), ("hmac-256", Algorithm.HMAC_SHA256, 32),
        ("hmac-384", Algorithm.HMAC_SHA384, 48), ("hmac-512", Algorithm.HMAC_SHA512, 64),
    ]:
        seed.secret(name, algorithm, size, MAC)
    value = secrets.token_bytes(32)
    seed.register("secret-data", objects.SecretData(value, enums.SecretDataType.PASSWORD, name="secret-data"), value)
    for bits in (2048, 3072, 4096):
        key = rsa.generate_private_key(65537, bits)
        pkcs8, pkcs1 = encoded(key, PrivateFormat.PKCS8), encoded(key, PrivateFormat.TraditionalOpenSSL)
        seed.pair(f"rsa-{bits}", Algorithm.RSA, bits, pkcs8, Format.PKCS_8, pkcs8)
        if bits == 2048:
            seed.pair("rsa-2048-pkcs1", Algorithm.RSA, bits, pkcs1, Format.PKCS_1, pkcs8)
            seed.pair("rsa-2048-raw", Algorithm.RSA, bits, pkcs1, Format.RAW, pkcs8)
    for name, curve in [
        ("p256", ec.SECP256R1()), ("p384", ec.SECP384R1()), ("p521", ec.SECP521R1()), ("secp256k1", ec.SECP256K1()),
    ]:
        key = ec.generate_private_key(curve)
        pkcs8, sec1 = encoded(key, PrivateFormat.PKCS8), encoded(key, PrivateFormat.TraditionalOpenSSL)
        seed.pair(name, Algorithm.EC, curve.key_size, pkcs8, Format.PKCS_8, pkcs8)
        # PyKMIP knows no format of its own for SEC 1.
        seed.pair(f"{name}-sec1", Algorithm.EC, curve.key_size, sec1, Format.RAW, pkcs8)


def what_is_refused(seed):
    seed.secret("pre-active", Algorithm.AES, 32, CRYPT, activate=False)
    deactivated = seed.secret("deactivated", Algorithm.AES, 32, CRYPT)
    seed.kmip.revoke(enums.RevocationReasonCode.CESSATION_OF_OPERATION, deactivated)
    compromised = seed.secret("compromised", Algorithm.AES, 32, CRYPT)
    seed.kmip.revoke(enums.RevocationReasonCode.KEY_COMPROMISE, compromised)
    destroyed = seed.secret("destroyed", Algorithm.AES, 32, CRYPT, activate=False)
    seed.kmip.destroy(destroyed)
    seed.secret("only-derives", Algorithm.AES, 32, [Usage.DERIVE_KEY])
    seed.secret("exportable", Algorithm.AES, 32, [Usage.DERIVE_KEY, Usage.EXPORT])
    for label in ("twin-1", "twin-2"):
        seed.secret(label, Algorithm.AES, 32, CRYPT, name="twin")
    wrapping = {
        "wrapping_method": enums.WrappingMethod.ENCRYPT,
        "encryption_key_information": {
            "unique_identifier": "1",
            "cryptographic_parameters": {"block_cipher_mode": enums.BlockCipherMode.NIST_KEY_WRAP},
        },
        "encoding_option": enums.EncodingOption.NO_ENCODING,
    }
    value = secrets.token_bytes(40)
    wrapped = objects.SymmetricKey(Algorithm.AES, 256, value, CRYPT, name="wrapped", key_wrapping_data=wrapping)
    seed.register("wrapped", wrapped, value)
    # A bare scalar, not PKCS#8. Never a random one: one in 256 begins as DER does, and looks cut off instead.
    scalar = bytes([7] * 32)
    broken = objects.PrivateKey(Algorithm.EC, 256, scalar, Format.PKCS_8, [Usage.SIGN], name="broken")
    seed.register("broken", broken, scalar)


def main():
    with client("client") as kmip:
        seed = Seed(kmip)
        secrets_and_pairs(seed)
        what_is_refused(seed)
    with client("other") as kmip:
        others = Seed(kmip)
        others.secret("of-another", Algorithm.AES, 32, CRYPT)
    # At once or not at all.
    draft = DIR / "seed.json.draft"
    draft.write_text(json.dumps(seed.made | others.made))
    draft.rename(DIR / "seed.json")


main()
