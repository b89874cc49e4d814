"""The parts of ops/demo that are no shell: the plan, the counting, the proof.

    demo.py plan DIR     makes keys in the stand-in for AWS KMS, source key files, requests and what is expected of them
    demo.py check DIR    compares jobs, events, dead letters and what KMS saw with the plan
    demo.py prove DIR    uses the keys in KMS and checks the answers with the bytes in the source key files
"""

import base64
import collections
import datetime
import hashlib
import hmac
import json
import os
import pathlib
import random
import secrets
import sys
import time
import urllib.parse
import urllib.request

ACCOUNT = "111122223333"
EU, US = "eu-central-1", "us-east-1"
SYMMETRIC = "SYMMETRIC_DEFAULT"
LENGTHS = {SYMMETRIC: 32, "HMAC_224": 28, "HMAC_256": 32, "HMAC_384": 48, "HMAC_512": 64}
HMACS = [kind for kind in LENGTHS if kind != SYMMETRIC]
PAIRS = ["RSA_2048", "ECC_NIST_P256", "ECC_NIST_P384", "ECC_NIST_P521", "ECC_SECG_P256K1"]


def http(method, url, body=None):
    parts = urllib.parse.urlsplit(url)
    headers = {"content-type": "application/json"}
    if parts.username:
        headers["authorization"] = "Basic " + base64.b64encode(f"{parts.username}:{parts.password}".encode()).decode()
    bare = parts._replace(netloc=f"{parts.hostname}:{parts.port}").geturl()
    data = None if body is None else json.dumps(body).encode()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(bare, data, headers, method=method), timeout=30) as answer:
        return json.loads(answer.read() or "null")


def new_pair(kind):
    """PKCS#8 DER of a private key."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    curves = {"ECC_NIST_P256": ec.SECP256R1, "ECC_NIST_P384": ec.SECP384R1, "ECC_NIST_P521": ec.SECP521R1,
              "ECC_SECG_P256K1": ec.SECP256K1}
    key = ec.generate_private_key(curves[kind]()) if kind in curves else rsa.generate_private_key(65537, 2048)
    return key.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8,
                             serialization.NoEncryption())


def register(directory, keys):
    """Registers keys on the KMIP server, by the client that comes with it: name, kind, bytes each."""
    from kmip import enums
    from kmip.pie import objects
    from kmip.pie.client import ProxyKmipClient

    usage, algorithm = enums.CryptographicUsageMask, enums.CryptographicAlgorithm
    files = {name: str(directory / "kmip" / file) for name, file in
             [("ca", "ca.crt"), ("cert", "client.crt"), ("key", "client.key")]}
    with ProxyKmipClient(hostname="127.0.0.1", port=int(os.environ["DEMO_KMIP_PORT"]), config_file=os.devnull,
                         ssl_version="PROTOCOL_TLSv1_2", kmip_version=enums.KMIPVersion.KMIP_1_2, **files) as server:
        for name, kind, material in keys:
            if kind == SYMMETRIC:
                masks = [usage.ENCRYPT, usage.DECRYPT]
                thing = objects.SymmetricKey(algorithm.AES, 256, material, masks, name=name)
            elif kind == "HMAC_256":
                masks = [usage.MAC_GENERATE, usage.MAC_VERIFY]
                thing = objects.SymmetricKey(algorithm.HMAC_SHA256, 256, material, masks, name=name)
            else:
                thing = objects.PrivateKey(algorithm.EC, 256, material, enums.KeyFormatType.PKCS_8, [usage.SIGN], name=name)
            server.activate(server.register(thing))


# --- plan -------------------------------------------------------------------------------------------------------


def plan(directory):
    endpoint = os.environ["AWS_ENDPOINT_URL_KMS"]
    now = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)

    def kms_keys(count, spec=SYMMETRIC, region=EU, **more):
        return http("POST", f"{endpoint}/_fake/keys", {"count": count, "spec": spec, "region": region, **more})["arns"]

    def in_days(days):
        return (now + datetime.timedelta(days=days)).strftime("%Y-%m-%dT%H:%M:%SZ")

    # The bytes are made here and nowhere else; the proof reads these files and never asks Keyferry.
    (directory / "source-keys").mkdir(mode=0o700)
    source_keys = {}
    for kind, count in [(SYMMETRIC, 12)] + [(kind, 3) for kind in HMACS] + [(kind, 2) for kind in PAIRS]:
        for number in range(1, count + 1):
            name = f"{kind.lower().replace('_', '-')}-{number:02}"
            path = directory / "source-keys" / f"{name}.hex"
            with open(path, "x", opener=lambda p, flags: os.open(p, flags, 0o600)) as file:
                file.write(new_pair(kind).hex() if kind in PAIRS else secrets.token_hex(LENGTHS[kind]))
            source_keys[name] = kind
    symmetric = [name for name, kind in source_keys.items() if kind == SYMMETRIC]
    # Keys that stay on the KMIP server, and are fetched from there by each job.
    on_server = []
    for kind, count in [(SYMMETRIC, 8), ("HMAC_256", 4), ("ECC_NIST_P256", 4)]:
        for number in range(1, count + 1):
            material = new_pair(kind) if kind in PAIRS else secrets.token_bytes(LENGTHS[kind])
            on_server.append((f"vault-{kind.lower().replace('_', '-')}-{number:02}", kind, material))
    register(directory, on_server)
    for name, _, material in on_server:
        path = directory / "source-keys" / f"{name}.hex"
        with open(path, "x", opener=lambda p, flags: os.open(p, flags, 0o600)) as file:
            file.write(material.hex())

    requests, expected = [], {}
    named, enabled, untouched, refused, expiry, deleted = {}, [], [], [], {}, []
    again_from_server = []

    def ask(outcome, code, key, **fields):
        request = {"id": f"demo-{len(requests) + 1:03}", "key": key, **fields}
        requests.append(request)
        expected[request["id"]] = [outcome, code]

    def succeed(key, name=None, valid_to=None, **fields):
        if name:
            fields["source_key_identifier"] = name
            named[key] = name
        if valid_to:
            fields |= {"key_expiration": True, "valid_to": valid_to}
            expiry[key] = valid_to
        enabled.append(key)
        ask("succeeded", None, key, **fields)

    # First imports of named source keys, each into three KMS keys.
    for name, *keys in zip(symmetric, kms_keys(12), kms_keys(12), kms_keys(12, region=US)):
        for key in keys:
            succeed(key, name, operation="import", source_key_tier="local")
    for kind in HMACS + PAIRS:
        names = [name for name, its_kind in source_keys.items() if its_kind == kind]
        for name, key in zip(names, kms_keys(len(names), kind)):
            succeed(key, name)
    # Named keys of the KMIP server, each into two KMS keys.
    for name, kind, _ in on_server:
        for key in kms_keys(2, kind):
            fields = {"source_key_tier": "dsm", "source_key_identifier": f"demo/{name}"}
            succeed(key, **fields)
            named[key] = name
            if kind == SYMMETRIC:
                again_from_server.append((key, fields))
    # First imports of keys that Keyferry generates.
    for key in kms_keys(60) + kms_keys(30, region=US):
        succeed(key)
    for kind in HMACS:
        for key in kms_keys(8, kind, US if kind == "HMAC_512" else EU):
            succeed(key)
    for kind in PAIRS:
        for key in kms_keys(2, kind):
            succeed(key)
    # Material that expires.
    for name, key in zip(symmetric, kms_keys(12)):
        succeed(key, name, in_days(30))
    for key in kms_keys(18, region=US):
        succeed(key, valid_to=in_days(60))
    # What would happen, and does not.
    for name, key in zip(symmetric, kms_keys(6)):
        untouched.append(key)
        ask("succeeded", None, key, source_key_identifier=name, dry_run=True)
    # What AWS or the source says no to.
    for key in kms_keys(3):
        untouched.append(key)
        ask("failed", "source_key_unknown", key, source_key_identifier="no-such-key")
    for key in kms_keys(3):
        untouched.append(key)
        ask("failed", "source_key_unknown", key, source_key_tier="dsm", source_key_identifier="demo/nothing")
    for key in kms_keys(3, origin="AWS_KMS"):
        ask("failed", "key_not_external", key)
    for key in kms_keys(2, "RSA_2048"):
        untouched.append(key)
        ask("failed", "wrapping_not_allowed", key, wrapping_algorithm="RSAES_OAEP_SHA_256")
    # What the worker itself refuses.
    for key in kms_keys(3):
        refused.append(key)
        ask("rejected", "valid_to_past", key, key_expiration=True, valid_to=in_days(-1))
    for key in kms_keys(3):
        refused.append(key)
        ask("rejected", "unknown_target", key.replace(ACCOUNT, "444455556666"))
    random.shuffle(requests)

    # After their first imports: the same material again, with a later expiry where it expires.
    for key, fields in again_from_server:
        succeed(key, **fields)
    fixed = [key for key in named if key not in expiry and not named[key].startswith("vault-")]
    again = random.sample(fixed, 48)
    for key in again[:36]:
        succeed(key, named[key])
    # The material goes, and half of it comes back.
    for number, key in enumerate(again[36:]):
        ask("succeeded", None, key, operation="delete")
        if number % 2:
            succeed(key, named[key])
        else:
            deleted.append(key)
            del named[key]
    for key in [key for key in expiry if key in named][:6]:
        succeed(key, named[key], in_days(90))
    # Copies of messages, with the same id.
    copies = random.sample([request for request in requests if expected[request["id"]][0] == "succeeded"], 40)

    # Copies of them come over the other transport, and so do requests that are the only one for their key.
    on_key = collections.Counter(request["key"] for request in requests)
    alone = [request for request in requests
             if on_key[request["key"]] == 1 and expected[request["id"]][0] == "succeeded"]
    over_sqs = random.sample(alone, 60)
    over_rabbitmq = [request for request in requests if request not in over_sqs]
    for name, lines in [("rabbitmq", over_rabbitmq), ("sqs", over_sqs + copies)]:
        with open(directory / f"requests-{name}.jsonl", "w") as file:
            for request in lines:
                file.write(json.dumps(request) + "\n")
    with open(directory / "source-keys.txt", "w") as file:
        for name, kind in source_keys.items():
            file.write(f"{name} {kind} {directory / 'source-keys' / name}.hex\n")
    with open(directory / "plan.json", "w") as file:
        facts = {"expected": expected, "copies": len(copies), "named": named, "kinds": source_keys | {name: kind for name, kind, _ in on_server},
                 "expiry": expiry,
                 "imports": collections.Counter(enabled), "untouched": untouched + refused, "refused": refused,
                 "deleted": deleted}
        json.dump(facts, file, indent=1)
    print(f"{len({*enabled, *untouched, *refused}) + 3} KMS keys, {len(source_keys) + len(on_server)} source keys, {len(on_server)} of them on the KMIP server, "
          f"{len(over_rabbitmq)} requests over RabbitMQ, {len(over_sqs)} over SQS, and {len(copies)} copies of some of them")


# --- check ------------------------------------------------------------------------------------------------------


def waiting_in(queue):
    """All messages of a queue, which keeps them."""
    url = f"{os.environ['DEMO_RABBITMQ_API']}/api/queues/%2f/{queue}/get"
    return http("POST", url, {"count": 5000, "ackmode": "ack_requeue_true", "encoding": "auto"})


def check(directory):
    facts = json.loads((directory / "plan.json").read_text())
    jobs = json.loads((directory / "jobs.json").read_text())
    expected = collections.Counter(map(tuple, facts["expected"].values()))
    wrong = []

    refused = [request for request, (outcome, _) in facts["expected"].items() if outcome == "rejected"]
    # Events are published after the outcome is committed: a moment's patience.
    end = time.monotonic() + 30
    while True:
        events = {}
        for message in waiting_in("keyferry.events.all"):
            event = json.loads(message["payload"])
            events.setdefault(event["id"], event)
        dead = [json.loads(message["payload"]) for message in waiting_in("keyferry.dead")]
        if (len(events) >= len(facts["expected"]) and len(dead) >= len(refused)) or time.monotonic() > end:
            break
        time.sleep(0.1)

    def verdict(job):
        return job["request_id"], (job["state"], (job["error"] or {}).get("code"))

    found = [verdict(job) for job in jobs if job["state"] != "rejected"]
    found += [(event["data"]["job"]["request_id"], ("rejected", event["data"]["error"]["code"]))
              for event in events.values() if event["type"] == "io.keyferry.job.rejected"]
    counts = collections.Counter(outcome for _, outcome in found)
    lines = [(outcome, code or "", expected[outcome, code], counts[outcome, code])
             for outcome, code in sorted(expected | counts, key=lambda pair: (pair[0] != "succeeded", pair[0], pair[1] or ""))]
    messages = len(facts["expected"]) + facts["copies"]
    lines.append(("copies", "", facts["copies"], messages - len(found)))
    lines.append(("messages", "", messages, messages))
    print(f"{'outcome':12}{'code':24}{'expected':>9}{'found':>9}")
    for outcome, code, want, have in lines:
        print(f"{outcome:12}{code:24}{want:9}{have:9}{'' if want == have else '   <-- differs'}")

    for request, outcome in found:
        if facts["expected"].get(request) != list(outcome):
            wrong.append(f"{request}: expected {facts['expected'].get(request)}, found {list(outcome)}")
    for request, times in collections.Counter(request for request, _ in found).items():
        if times != 1:
            wrong.append(f"{request} ended {times} times")
    wrong += [f"{request} never ended" for request in facts["expected"].keys() - {request for request, _ in found}]

    told = collections.Counter((event["data"]["job"]["request_id"], event["type"].rsplit(".")[-1]) for event in events.values())
    due = {(request, outcome) for request, (outcome, _) in facts["expected"].items()}
    wrong += [f"no event says that {request} {outcome}" for request, outcome in sorted(due - told.keys())]
    wrong += [f"an event says that {request} {outcome}" for request, outcome in sorted(told.keys() - due)]
    wrong += [f"{times} different events for {request}" for (request, _), times in told.items() if times > 1]
    if sorted(message.get("id", "?") for message in dead) != sorted(refused):
        wrong.append(f"keyferry.dead holds {len(dead)} messages, and not just the {len(refused)} refused ones")
    print(f"\n{len(events)} events, one for each outcome; {len(dead)} refused messages in keyferry.dead")

    # What KMS saw, by its own record: one import for each request that succeeded, none for a copy, no call for a refusal.
    journal = http("GET", f"{os.environ['AWS_ENDPOINT_URL_KMS']}/_fake/journal?limit=100000")["entries"]
    imports = collections.Counter(entry["key_arn"] for entry in journal if "imported" in (entry["effect"] or {}))
    for key in imports.keys() | facts["imports"].keys():
        if imports[key] != facts["imports"].get(key, 0):
            wrong.append(f"{key}: {imports[key]} imports, expected {facts['imports'].get(key, 0)}")
    calls = [entry for entry in journal if entry["access_key"]]
    wrong += [f"{entry['key_arn']}: {entry['operation']} for a refused request" for entry in calls
              if entry["key_arn"] in facts["refused"]]
    operations = ", ".join(f"{name} {count}" for name, count in
                           collections.Counter(entry["operation"] for entry in calls).most_common())
    print(f"calls that KMS saw: {operations}")

    example = next((event for event in events.values()
                    if event["type"] == "io.keyferry.job.succeeded" and event["subject"] in facts["named"]), None)
    if example:
        print("\nA result:\n" + json.dumps(example["data"]["result"], indent=2))
        short = {**example, "data": {**example["data"], "result": "(as above)"}}
        print("\nIts event:\n" + json.dumps(short, indent=2))
    finish(wrong)


# --- prove ------------------------------------------------------------------------------------------------------


def prove(directory):
    import botocore.session
    from cryptography.exceptions import InvalidSignature, InvalidTag
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, padding
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    facts = json.loads((directory / "plan.json").read_text())
    held = {name: bytes.fromhex((directory / "source-keys" / f"{name}.hex").read_text()) for name in facts["kinds"]}
    session = botocore.session.get_session()
    clients = {region: session.create_client("kms", region_name=region, endpoint_url=os.environ["AWS_ENDPOINT_URL_KMS"])
               for region in (EU, US)}
    wrong, decrypted, verified, signed = [], 0, 0, 0
    macs = sum(facts["kinds"][name] in HMACS for name in facts["named"].values())
    pairs = sum(facts["kinds"][name] in PAIRS for name in facts["named"].values())
    ciphers = len(facts["named"]) - macs - pairs

    def kms(key):
        return clients[key.split(":")[3]]

    def opened(material, blob):
        # 0x01, id of the material, nonce, then AES-256-GCM with its tag.
        if blob[0] != 1 or len(blob) < 1 + 32 + 12 + 16:
            raise ValueError("a ciphertext of another layout")
        return AESGCM(material).decrypt(blob[33:45], blob[45:], b"")

    def verify(key, kind, name, message):
        bits = {"ECC_NIST_P384": 384, "ECC_NIST_P521": 512}.get(kind, 256)
        algorithm = f"RSASSA_PSS_SHA_{bits}" if kind.startswith("RSA") else f"ECDSA_SHA_{bits}"
        signature = kms(key).sign(KeyId=key, Message=message, SigningAlgorithm=algorithm)["Signature"]
        public_key = serialization.load_der_private_key(held[name], None).public_key()
        digest = getattr(hashes, f"SHA{bits}")()
        if kind.startswith("RSA"):
            pss = padding.PSS(padding.MGF1(digest), padding.PSS.DIGEST_LENGTH)
            public_key.verify(signature, message, pss, digest)
        else:
            public_key.verify(signature, message, ec.ECDSA(digest))

    for key, name in facts["named"].items():
        message, kind = secrets.token_bytes(48), facts["kinds"][name]
        try:
            if kind == SYMMETRIC:
                blob = kms(key).encrypt(KeyId=key, Plaintext=message)["CiphertextBlob"]
                if opened(held[name], blob) == message:
                    decrypted += 1
                else:
                    wrong.append(f"{key}: decrypts to something else")
            elif kind in PAIRS:
                verify(key, kind, name, message)
                signed += 1
            else:
                bits = kind.removeprefix("HMAC_")
                mac = kms(key).generate_mac(KeyId=key, Message=message, MacAlgorithm=f"HMAC_SHA_{bits}")["Mac"]
                if hmac.compare_digest(mac, hmac.digest(held[name], message, getattr(hashlib, f"sha{bits}"))):
                    verified += 1
                else:
                    wrong.append(f"{key}: the MAC is not that of {name}")
        except (InvalidSignature, InvalidTag):
            wrong.append(f"{key}: does not hold {name}")
        except Exception as error:  # each key is reported, whatever goes wrong with it
            wrong.append(f"{key}: {type(error).__name__}: {error}")
    print(f"{decrypted} of {ciphers} symmetric keys: what KMS encrypted was decrypted with the held bytes")
    print(f"{verified} of {macs} HMAC keys: KMS's MAC is the one computed from the held bytes")
    print(f"{signed} of {pairs} RSA and ECC keys: KMS's signature is verified with the held pair's public key")

    # A check that cannot fail proves nothing.
    key, name = next((key, name) for key, name in facts["named"].items() if facts["kinds"][name] == SYMMETRIC)
    blob = kms(key).encrypt(KeyId=key, Plaintext=b"control")["CiphertextBlob"]
    try:
        opened(next(material for other, material in held.items() if other != name and len(material) == 32), blob)
        wrong.append("control: other bytes decrypt, too")
    except InvalidTag:
        print("control: other bytes do not decrypt it")

    def state(key):
        return kms(key).describe_key(KeyId=key)["KeyMetadata"]

    before = len(wrong)
    for key in facts["imports"].keys() - set(facts["deleted"]):
        if (metadata := state(key))["KeyState"] != "Enabled":
            wrong.append(f"{key}: {metadata['KeyState']}, expected Enabled")
        has = metadata.get("ValidTo")
        has = has and has.astimezone(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        if has != facts["expiry"].get(key):
            wrong.append(f"{key}: expires {has}, expected {facts['expiry'].get(key)}")
    if len(wrong) == before:
        print(f"{len(facts['imports']) - len(facts['deleted'])} keys are enabled, {len(facts['expiry'])} of them expire at the time asked for")
    before = len(wrong)
    for key in facts["untouched"] + facts["deleted"]:
        if (metadata := state(key))["KeyState"] != "PendingImport":
            wrong.append(f"{key}: {metadata['KeyState']}, expected PendingImport")
    if len(wrong) == before:
        print(f"{len(facts['untouched'])} keys of refused and failed requests and of dry runs are as they were; "
              f"{len(facts['deleted'])} have given up their material")
    finish(wrong)


def finish(wrong):
    for line in wrong[:20]:
        print(f"WRONG: {line}", file=sys.stderr)
    if wrong:
        sys.exit(f"{len(wrong)} things are not as expected")


if __name__ == "__main__":
    {"plan": plan, "check": check, "prove": prove}[sys.argv[1]](pathlib.Path(sys.argv[2]))
