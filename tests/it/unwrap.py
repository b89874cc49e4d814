"""Opens what Keyferry wrapped, by another library than Keyferry's, and looks at the keys inside.

Standard input: a JSON array of {"private_key", "algorithm", "wrapped", "material", "public_key"}; all but the algorithm are
hex, and the public key, a SubjectPublicKeyInfo, is null for what is no pair. Says how many were as they should be, or fails.
"""

import json
import sys

from cryptography.hazmat.primitives import hashes, keywrap, serialization
from cryptography.hazmat.primitives.asymmetric import padding


def unwrap(private_key, algorithm, wrapped):
    digest = hashes.SHA256() if algorithm.endswith("SHA_256") else hashes.SHA1()
    oaep = padding.OAEP(mgf=padding.MGF1(digest), algorithm=digest, label=None)
    size = private_key.key_size // 8
    if algorithm.startswith("RSAES_OAEP"):
        return private_key.decrypt(wrapped, oaep)
    return keywrap.aes_key_unwrap_with_padding(private_key.decrypt(wrapped[:size], oaep), wrapped[size:])


def public_key(material):
    pair = serialization.load_der_private_key(material, password=None)
    return pair.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


private_keys = {}
cases = json.load(sys.stdin)
for at, case in enumerate(cases):
    der = bytes.fromhex(case["private_key"])
    if der not in private_keys:
        private_keys[der] = serialization.load_der_private_key(der, password=None)
    material = bytes.fromhex(case["material"])
    opened = unwrap(private_keys[der], case["algorithm"], bytes.fromhex(case["wrapped"]))
    if opened != material:
        sys.exit(f"case {at}, {case['algorithm']}: other bytes come out")
    if case["public_key"] is not None and public_key(material) != bytes.fromhex(case["public_key"]):
        sys.exit(f"case {at}: another public key")
print(f"{len(cases)} opened")
