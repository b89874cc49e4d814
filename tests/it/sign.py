"""Signs a request as ops/manual/policy.md says it, with Python's cryptography: key file, key id, audience, expiry, content type."""

import base64
import hashlib
import sys

from cryptography.hazmat.primitives.serialization import load_pem_private_key

key_file, key_id, audience, expires, content_type = sys.argv[1:]
body = sys.stdin.buffer.read()
with open(key_file, "rb") as file:
    key = load_pem_private_key(file.read(), None)
lines = ["keyferry-signature-v1", key_id, audience, expires, "", content_type, hashlib.sha256(body).hexdigest()]
signature = base64.b64encode(key.sign("\n".join(lines).encode())).decode()
print(f"v1;key={key_id};audience={audience};expires={expires};sig={signature}")
