"""The quota governor: how much of AWS's quotas four workers use, and how often they are throttled all the same.

The fake KMS counts calls as AWS does, by account, Region and operation, in buckets that hold one second's calls. Workers
keep nothing free for others here (`reserve = 0`), so that what is used is measured against all that AWS gives.
"""

import collections
import contextlib
import datetime
import json
import os
import socket
import time

GET, IMPORT, DELETE = "GetParametersForImport", "ImportKeyMaterial", "DeleteImportedKeyMaterial"
OURS = "AKIAFAKEKEYFERRY0001"
# The worker's own account, and one whose keys it reaches by a role.
ACCOUNT, OTHER = "111122223333", "444455556666"
ROLE = f"arn:aws:iam::{OTHER}:role/keyferry"
WORKERS = 4


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Scenario:
    """A fake KMS with quotas, a database, workers that know the quotas."""

    def __init__(self, bench, tools, name, rates, strangers=None):
        self.bench, self.tools, self.name, self.rates = bench, tools, name, rates
        self.strangers = strangers or {}

    def configs(self):
        text = self.bench.config.read_text()
        head, rest = text.split("\n", 1)
        rest = rest.split("\n", 1)[1]
        given = ", ".join(f"{name} = {rate}" for name, rate in self.rates.items())
        for number in range(WORKERS):
            path = self.bench.dir / f"quota-{number}.toml"
            own = f"{head}\nquota.rates = {{ {given} }}\nquota.reserve = 0.0\n{rest}"
            own = own.replace(f'listen = "{self.bench.admin}"', f'listen = "127.0.0.1:{free_port()}"')
            path.write_text(f'{own}\n[[targets]]\naccount = "{OTHER}"\nregions = ["eu-central-1"]\nrole_arn = "{ROLE}"\n')
            yield path

    @contextlib.contextmanager
    def running(self, requests):
        """From the first call on; `requests` makes them when the fake KMS stands."""
        tools, bench = self.tools, self.bench
        with bench.fake_kms() as (url, _):
            for queue in ("keyferry.jobs", "keyferry.events.all"):
                bench.load("drain", queue)
            bench.fresh_database()
            bench.load("publish", requests(url))
            rates = {**self.rates, "DescribeKey": 100_000, "GetPublicKey": 100_000}
            tools.call("POST", f"{url}/_fake/quota", {"enabled": True, "rates": rates, "strangers": self.strangers})
            tools.call("POST", f"{url}/_fake/roles", {"arn": ROLE, "trusts": ACCOUNT})
            os.environ["AWS_ENDPOINT_URL_STS"] = url
            workers = [tools.start([bench.program, "--config", path, "serve"], bench.dir / "quota-workers.log")
                       for path in self.configs()]
            try:
                yield url
            finally:
                for worker in workers:
                    worker.kill()
                    worker.wait()

    def requests(self, url, count, accounts=(ACCOUNT,), operation="import", copies=2):
        """Each is published twice: a duplicate must cost nothing."""
        path = self.bench.dir / "quota-requests.jsonl"
        with open(path, "w") as file:
            for account in accounts:
                arns = self.tools.call("POST", f"{url}/_fake/keys", {"count": count, "account": account})["arns"]
                for number, arn in enumerate(arns):
                    request = {"id": f"{account}-{number}", "key": arn, "operation": operation}
                    if operation == "import":
                        request["source_key_identifier"] = self.tools.source_key(0)
                    file.write((json.dumps(request) + "\n") * copies)
        return path

    def calls(self, url):
        """Our calls of governed operations, as `(operation, account, outcome, seconds)`, and how many were made twice."""
        journal = self.tools.call("GET", f"{url}/_fake/journal")["entries"]
        ours = [entry for entry in journal if entry["access_key"] == OURS and entry["operation"] in self.rates]
        twice = collections.Counter((entry["operation"], entry["key_arn"]) for entry in ours if entry["outcome"] == "ok")
        at = lambda entry: datetime.datetime.fromisoformat(entry["at"].replace("Z", "+00:00")).timestamp()
        return ([(entry["operation"], entry["account"], entry["outcome"], at(entry)) for entry in ours],
                sum(count - 1 for count in twice.values()))

    def taken(self, url, operation):
        """What strangers have used so far."""
        found = self.tools.call("GET", f"{url}/_fake/quota")["strangers"]
        return sum(one["taken"] for one in found if one["operation"] == operation)

    def watch(self, operation, seconds, count, warm=5, **requests):
        """How much of its quota an operation uses while there is always work."""
        with self.running(lambda url: self.requests(url, count, **requests)) as url:
            self.tools.until(60, f"the first {operation}", lambda: self.first(url, operation), 0.05)
            time.sleep(warm)
            begun, taken = time.time(), self.taken(url, operation)
            time.sleep(seconds)
            ended, taken = time.time(), self.taken(url, operation) - taken
            calls, twice = self.calls(url)
        rate, within = self.rates[operation], [one for one in calls if begun <= one[3] < ended]
        times = sorted(one[3] for one in within if one[0] == operation and one[2] == "ok")
        ok, span = len(times), times[-1] - times[0]
        throttled = sum(one[2] == "throttled" for one in within)
        found = {"scenario": self.name, "operation": operation, "rate": rate, "seconds": ended - begun, "ok": ok,
                 "throttled": throttled, "calls": len(within), "made_twice": twice, "taken_by_strangers": taken,
                 # From call to call: where the window begins and ends must not count.
                 "used": (ok - 1) / (span * (rate - taken / (ended - begun))), "throttled_part": throttled / max(1, len(within))}
        self.tools.say(f"quota      {self.name}: {ok} calls in {ended - begun:.0f} s, {found['used']:.1%} of what there is"
                       f"{f' (strangers took {taken})' if self.strangers else ''}, {found['throttled_part']:.1%} throttled, "
                       f"{twice} made twice")
        return found

    def first(self, url, operation):
        entries = self.tools.call("GET", f"{url}/_fake/journal?operation={operation}&limit=1")["entries"]
        return entries or None

    def finish(self, count, accounts):
        """How long each account's jobs take, from the first call to the last."""
        with self.running(lambda url: self.requests(url, count, accounts=accounts, copies=1)) as url:
            done = lambda: self.bench.sql("select count(*) from job where state = 'succeeded'", "-d", "keyferry")
            self.tools.until(300, "all jobs", lambda: int(done()) >= count * len(accounts) or None, 0.2)
            calls, _ = self.calls(url)
        times = collections.defaultdict(list)
        for operation, account, outcome, at in calls:
            if (operation, outcome) == (GET, "ok"):
                times[account].append(at)
        return {account: max(of_account) - min(of_account) for account, of_account in times.items()}


def measure(bench, tools, table):
    """All scenarios; adds their rows to the table."""
    found = []

    def row(name, operation, rates, seconds, used, throttled, strangers=None, **more):
        scenario = Scenario(bench, tools, name, rates, strangers)
        count = int((seconds + 30) * rates[operation]) + 20
        run = scenario.watch(operation, seconds, count, **more)
        found.append(run)
        good = None if used is None else run["used"] >= used and run["throttled_part"] <= throttled and not run["made_twice"]
        target = "" if used is None else f">= {used:.0%}, <= {throttled:.0%}"
        table.add(name, f"{run['used']:.1%} used, {run['throttled_part']:.1%} throttled", "", "", target, good)

    row("quota 1/s: GetParametersForImport", GET, {GET: 1, IMPORT: 15}, 120, 0.97, 0.01)
    row("quota 15/s: ImportKeyMaterial", IMPORT, {GET: 30, IMPORT: 15}, 60, 0.97, 0.01, warm=15)
    row("  a stranger takes a third of 10/s", GET, {GET: 10, IMPORT: 150}, 90, 0.90, 0.03, {GET: 10 / 3, IMPORT: 50}, warm=20)
    row("  a stranger takes a third of 15/s", IMPORT, {GET: 30, IMPORT: 15}, 90, 0.90, 0.03, {IMPORT: 5}, warm=20)
    rates, count = {GET: 10, IMPORT: 150}, 200
    alone = Scenario(bench, tools, "alone", rates).finish(count, [ACCOUNT])[ACCOUNT]
    both = Scenario(bench, tools, "side by side", rates).finish(count, [ACCOUNT, OTHER])
    slowest = max(both.values())
    found.append({"scenario": "side by side", "alone_seconds": alone, "both_seconds": both})
    tools.say(f"quota      {count} jobs of one account alone: {alone:.1f} s; beside as many of another: {slowest:.1f} s")
    table.add("two accounts side by side, s", f"{slowest:.1f}", "", f"{slowest / alone:.2f}x", "<= 1.10x", slowest / alone <= 1.1)
    return found
