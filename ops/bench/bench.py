"""What ops/bench/run does once the servers stand: the runs, the checks on them, the table.

A run that does not end with every job succeeded, one event each, and at most four AWS calls for each is an error and
no measurement.
"""

import argparse
import collections
import contextlib
import http.client
import json
import os
import pathlib
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import quota
from table import Table

IN_FLIGHT = 64
MOST_CALLS = 4
REQUEST_BYTES = 400
SOURCE_KEYS = 4
SLOW_MS = 20
RATE, RATE_SECONDS = 100, 20
PARTS = ["throughput", "slow", "latency", "memory", "sqs", "quota"]
POLLERS = 4
FEW = 2000
OPERATIONS = ["GetParametersForImport", "ImportKeyMaterial", "DeleteImportedKeyMaterial", "RotateKeyOnDemand",
              "ListKeyRotations"]
UNGOVERNED = "quota.rates = { " + ", ".join(f'{name} = "unlimited"' for name in OPERATIONS) + " }"
TICK_MS = 1000 / os.sysconf("SC_CLK_TCK")
ROOT = pathlib.Path(__file__).resolve().parents[2]
NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def arguments():
    parser = argparse.ArgumentParser(prog="ops/bench/run")
    parser.add_argument("--jobs", type=int, default=5000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=["ours", "naive"])
    parser.add_argument("--parts", type=lambda text: text.split(","), default=PARTS)
    parser.add_argument("--waiting", type=int, default=100_000)
    parser.add_argument("--against", type=pathlib.Path)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--debug", action="store_true")
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"--parts: there is no {', '.join(sorted(unknown))}")
    if min(given.jobs, given.runs, given.waiting) < 1:
        parser.error("numbers start at 1")
    if given.only or given.against:
        given.parts = ["throughput"]
    given.kinds = [given.only] if given.only else ["naive", "ours"]
    if given.against:
        given.kinds.append("against")
    return given


def say(text):
    print(text, file=sys.stderr, flush=True)


def call(method, url, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"}, method=method)
    with NO_PROXY.open(request, timeout=60) as answer:
        return json.loads(answer.read() or "null")


# --- processes and what they use ----------------------------------------------------------------------------------


def stat(pid):
    """Parent, and clock ticks of a process with its children that have ended."""
    text = pathlib.Path(f"/proc/{pid}/stat").read_text()
    fields = text[text.rindex(")") + 2:].split()
    return int(fields[1]), sum(map(int, fields[11:15]))


def cpu_ms(root):
    """CPU of a whole tree; a child that ends meanwhile goes over to its parent's account."""
    parents, ticks = {}, {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry)], ticks[int(entry)] = stat(entry)
    children = collections.defaultdict(list)
    for pid, parent in parents.items():
        children[parent].append(pid)
    total, left = 0, [root]
    while left:
        pid = left.pop()
        total += ticks.get(pid, 0)
        left += children[pid]
    return total * TICK_MS


def memory_kib(pid):
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return {name: int(fields[name].split()[0]) for name in ("VmHWM", "VmRSS")}


def start(command, log, **more):
    with open(log, "ab") as file:
        return subprocess.Popen(list(map(str, command)), stdin=subprocess.DEVNULL, stderr=file,
                                **{"stdout": file, **more})


def stop(process, seconds=60):
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise


def until(seconds, what, condition, pause=0.002):
    end = time.monotonic() + seconds
    while True:
        if (found := condition()) is not None:
            return found
        if time.monotonic() > end:
            sys.exit(f"{what}: not within {seconds} s")
        time.sleep(pause)


# --- the surroundings ---------------------------------------------------------------------------------------------


class Bench:
    def __init__(self, given):
        env = os.environ
        self.given = given
        self.dir, self.bin = pathlib.Path(env["BENCH_DIR"]), pathlib.Path(env["BENCH_BIN"])
        self.admin = env["BENCH_ADMIN"]
        self.trees = {"postgres": int(env["BENCH_PG_PID"]), "rabbitmq": int(env["BENCH_MQ_PID"])}
        self.config = self.dir / "keyferry.toml"
        self.runs = []
        self.program = self.bin / "keyferry"

    def sql(self, text=None, *more, **variables):
        env = {**os.environ, "PGPASSWORD": os.environ["BENCH_PG_PASSWORD"], "PGSSLMODE": "verify-full",
               "PGSSLROOTCERT": os.environ["KEYFERRY_DATABASE__CA_FILE"], **variables}
        command = [os.environ["BENCH_PG_BIN"] + "/psql", "-XqAt", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1",
                   "-p", os.environ["BENCH_PG_PORT"], "-U", "postgres", *more]
        if text:
            command += ["-c", text]
        return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.strip()

    def keyferry(self, *words):
        subprocess.run([self.program, "--config", self.config, *words], check=True,
                       stdout=subprocess.DEVNULL)

    def load(self, *words):
        done = subprocess.run([self.bin / "load", *map(str, words)], check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(done.stdout or "null")

    def prepare(self):
        with open(self.dir / "kek", "x", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(os.urandom(32).hex())
        self.config.write_text(f"""policy = "allow-all"
{UNGOVERNED}

[keys]
kek_file = "{self.dir}/kek"

[[targets]]
account = "111122223333"
regions = ["eu-central-1"]

[admin]
listen = "{self.admin}"

[worker]
concurrency = {IN_FLIGHT}
""")
        self.keyferry("topology", "apply")

    def fresh_database(self):
        """New and never analysed: plans must be good from the first statement on."""
        self.sql("drop database if exists keyferry with (force)", "-d", "postgres")
        self.sql(None, "-d", "postgres", "-f", str(ROOT / "ops/postgres/database.sql"), KEYFERRY_DATABASE="keyferry")
        self.keyferry("migrate")
        for number in range(SOURCE_KEYS):
            self.keyferry("keys", "create", "--name", source_key(number))

    @contextlib.contextmanager
    def fake_kms(self, latency_ms=0):
        port = self.dir / "fake-kms.port"
        port.unlink(missing_ok=True)
        process = start([self.bin / "examples/fake-kms", "--listen", "127.0.0.1:0", "--port-file", port,
                         "--unwrap", "lazy", "--latency-ms", latency_ms], self.dir / "fake-kms.log")
        try:
            until(20, "fake-kms", lambda: port.exists() or None)
            url = f"http://127.0.0.1:{port.read_text()}"
            os.environ["AWS_ENDPOINT_URL_KMS"] = url
            yield url, process.pid
        finally:
            process.kill()
            process.wait()

    def requests(self, url, count, keys=None):
        """Requests of about 400 bytes, each for a KMS key of its own unless there are fewer keys."""
        arns = call("POST", f"{url}/_fake/keys", {"count": min(count, keys or count)})["arns"]
        path = self.dir / "requests.jsonl"
        with open(path, "w") as file:
            for number in range(count):
                request = {
                    "id": f"bench-{number:07}",
                    "operation": "import",
                    "key": arns[number % len(arns)],
                    "source_key_tier": "local",
                    "source_key_identifier": source_key(number % SOURCE_KEYS),
                    "key_expiration": False,
                    "wrapping_algorithm": "RSAES_OAEP_SHA_256",
                    "wrapping_key_spec": "RSA_4096",
                    "batch": "bench",
                    "key_material_description": "",
                }
                request["key_material_description"] = "x" * (REQUEST_BYTES - len(json.dumps(request)))
                file.write(json.dumps(request) + "\n")
        return path

    @contextlib.contextmanager
    def worker(self, orderly=True, config=None):
        """From its start to its end; gives the process and how long it took to be ready."""
        from_start = time.monotonic()
        process = start([self.program, "--config", config or self.config, "serve"], self.dir / "worker.log")
        try:
            until(30, "the worker's readiness", lambda: self.is_ready(process))
            yield process, (time.monotonic() - from_start) * 1000
            if orderly and (code := stop(process)):
                sys.exit(f"the worker's exit code was {code}")
        finally:
            process.kill()
            process.wait()

    def is_ready(self, process):
        if process.poll() is not None:
            sys.exit(f"the worker stopped while starting, see {self.dir}/worker.log")
        with contextlib.suppress(OSError):
            return self.get_admin("/readyz")[0] == 200 or None

    def get_admin(self, path):
        connection = http.client.HTTPConnection(self.admin, timeout=10)
        connection.request("GET", path)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, text

    def metric(self, name):
        found = [float(line.rsplit(" ", 1)[1]) for line in self.get_admin("/metrics")[1].splitlines()
                 if line.split("{")[0].split(" ")[0] == name]
        return sum(found)

    # --- runs -------------------------------------------------------------------------------------------------

    def measure(self, kind, jobs, latency_ms=0, in_flight=IN_FLIGHT, profiler=None):
        with self.fake_kms(latency_ms) as (url, fake):
            self.load("drain", "keyferry.jobs")
            self.load("drain", "keyferry.events.all")
            self.program = self.given.against if kind == "against" else self.bin / "keyferry"
            if kind != "naive":
                self.fresh_database()
            self.load("publish", self.requests(url, jobs))
            self.settle_down()
            trees = {**self.trees, "fake_kms": fake}
            run = self.naive(jobs, in_flight, trees) if kind == "naive" else self.ours(jobs, trees, profiler)
            run = {"kind": kind, "jobs": jobs, "latency_ms": latency_ms, "in_flight": in_flight, **run}
            run["jobs_per_s"] = jobs / run["seconds"]
            run["cpu_ms_per_job"] = {name: ms / jobs for name, ms in run.pop("cpu_ms").items()}
            self.check(kind, run, url)
        return run

    def settle_down(self):
        """What publishing and a new database left to be done is not this run's cost."""
        self.sql("checkpoint", "-d", "postgres")
        time.sleep(1.5)

    def ours(self, jobs, trees, profiler):
        before = {name: cpu_ms(pid) for name, pid in trees.items()}
        with self.worker() as (process, ready_ms):
            attached = profiler and start([*profiler, process.pid], self.dir / "profiler.log")
            # The counter moves when the broker has confirmed, the last step of a job. Few looks while there is
            # much to do, many near the end.
            begun = time.monotonic()

            def published():
                count = self.metric("keyferry_events_published_total")
                if count < jobs * 0.9:
                    time.sleep(0.05)
                return count >= jobs or None

            until(60 + jobs / 50, "all events", published, 0.004)
            seconds = time.monotonic() - begun
            trees = {"worker": process.pid, **trees}
            after = {name: cpu_ms(pid) for name, pid in trees.items()}
            # Forgetting the last events follows their confirmation.
            time.sleep(0.3)
            memory = memory_kib(process.pid)
            if attached:
                attached.send_signal(signal.SIGINT)
                attached.wait()
        return {"seconds": seconds, "ready_ms": ready_ms, "memory_kib": memory,
                "cpu_ms": {name: after[name] - before.get(name, 0) for name in trees}}

    def naive(self, jobs, in_flight, trees):
        before = {name: cpu_ms(pid) for name, pid in trees.items()}
        from_start = time.monotonic()
        process = start([self.bin / "naive", jobs, in_flight], self.dir / "naive.log", stdout=subprocess.PIPE,
                        text=True)
        try:
            if process.stdout.readline() != "ready\n":
                sys.exit(f"the naive consumer did not start, see {self.dir}/naive.log")
            begun = time.monotonic()
            line = process.stdout.readline()
            seconds = time.monotonic() - begun
            if not line:
                sys.exit(f"the naive consumer stopped, see {self.dir}/naive.log")
            trees = {"worker": process.pid, **trees}
            after = {name: cpu_ms(pid) for name, pid in trees.items()}
            memory = memory_kib(process.pid)
            stop(process)
        finally:
            process.kill()
        return {"seconds": seconds, "ready_ms": (begun - from_start) * 1000, "memory_kib": memory,
                "calls_ms": json.loads(line),
                "cpu_ms": {name: after[name] - before.get(name, 0) for name in trees}}

    def check(self, kind, run, url):
        jobs, wrong = run["jobs"], []

        def expect(what, found, wanted):
            if found != wanted:
                wrong.append(f"{what}: {found}, expected {wanted}")

        journal = call("GET", f"{url}/_fake/journal")["entries"]
        calls = [entry for entry in journal if entry["access_key"]]
        run["calls"] = collections.Counter(f"{entry['operation']} {entry['outcome']}" for entry in calls)
        imports = collections.Counter(entry["key_arn"] for entry in journal if "imported" in (entry["effect"] or {}))
        expect("keys with one import each", sum(count == 1 for count in imports.values()), jobs)
        if max(collections.Counter(entry["key_arn"] for entry in calls).values()) > MOST_CALLS:
            wrong.append(f"a job took more than {MOST_CALLS} AWS calls")
        expect("messages left", self.load("drain", "keyferry.jobs")["messages"], 0)
        if kind != "naive":
            expect("jobs", self.sql("select state, count(*) from job group by 1 order by 1", "-d", "keyferry"),
                   f"succeeded|{jobs}")
            expect("events in the outbox", self.sql("select count(*) from outbox", "-d", "keyferry"), "0")
            events = self.load("drain", "keyferry.events.all")
            expect("events", (events["events"], events["requests"], events["types"]),
                   (jobs, jobs, {"io.keyferry.job.succeeded": jobs}))
        if wrong:
            sys.exit(f"a run of {kind} is not right, so it is no measurement:\n" + "\n".join(wrong))

    def record(self, part, run):
        self.runs.append({"part": part, **run})
        cpu = ", ".join(f"{name} {ms:.3f}" for name, ms in run["cpu_ms_per_job"].items())
        say(f"{part:11}{run['kind']:7}{run['jobs_per_s']:8.0f} jobs/s   CPU ms per job: {cpu}")
        return run

    def alternating(self, part, latency_ms=0):
        runs = {"ours": [], "naive": [], "against": []}
        for number in range(self.given.runs):
            # None is always the one that finds the machine warm.
            for kind in self.given.kinds if number % 2 == 0 else reversed(self.given.kinds):
                runs[kind].append(self.record(part, self.measure(kind, self.given.jobs, latency_ms)))
        return runs

    def latency(self):
        count = RATE * RATE_SECONDS
        with self.fake_kms() as (url, _):
            self.load("drain", "keyferry.jobs")
            self.load("drain", "keyferry.events.all")
            self.fresh_database()
            path = self.requests(url, count)
            self.settle_down()
            with self.worker():
                found = self.load("paced", path, RATE)
        if found["succeeded"] != count:
            sys.exit(f"{found['succeeded']} of {count} paced jobs succeeded")
        say(f"latency    ours    p50 {found['p50_ms']:.1f} ms, p99 {found['p99_ms']:.1f} ms")
        return found

    def memory(self):
        """Jobs that wait in Postgres while 64 of a slow AWS are under way."""
        with self.fake_kms(2000) as (url, _):
            self.load("drain", "keyferry.jobs")
            self.fresh_database()
            path = self.requests(url, self.given.waiting, keys=2000)
            with self.worker(orderly=False) as (process, _):
                few = self.dir / "few.jsonl"
                with open(path) as all_, open(few, "w") as file:
                    file.writelines(line for _, line in zip(range(1000), all_))
                self.load("publish", few)
                until(60, "64 under way", lambda: self.metric("keyferry_jobs_running") >= IN_FLIGHT or None, 0.1)
                time.sleep(5)
                busy = memory_kib(process.pid)
                # The first thousand are copies now, which is no less work for intake.
                self.load("publish", path)
                until(600, "all accepted",
                      lambda: self.metric("keyferry_intake_messages_total") >= self.given.waiting + 1000 or None, 0.2)
                time.sleep(3)
                waiting = memory_kib(process.pid)
                count = int(self.sql("select count(*) from job where state = 'waiting'", "-d", "keyferry"))
                found = {"in_flight": busy, "waiting": waiting, "jobs_waiting": count}
                say(f"memory     ours    {busy['VmRSS'] / 1024:.1f} MiB, with {count} waiting "
                    f"{waiting['VmRSS'] / 1024:.1f} MiB")
        return found

    # --- SQS --------------------------------------------------------------------------------------------------

    def queues(self):
        """A new queue of requests and its dead-letter queue, and settings that receive from it."""
        self.made = getattr(self, "made", 0) + 1
        dead = sqs("CreateQueue", QueueName=f"bench-dead-{self.made}")["QueueUrl"]
        arn = sqs("GetQueueAttributes", QueueUrl=dead, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
        policy = json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": 5})
        url = sqs("CreateQueue", QueueName=f"bench-jobs-{self.made}", Attributes={"RedrivePolicy": policy})["QueueUrl"]
        config = self.dir / "keyferry-sqs.toml"
        config.write_text(f'requests_from = ["sqs"]\n{self.config.read_text()}\n[sqs]\npollers = {POLLERS}\nwait_s = 1\n'
                          f'requests_queue_url = "{url}"\ndead_letter_queue_url = "{dead}"\n')
        return url, config

    def idle_requests(self, count):
        """Requests that are accepted and then wait for weeks: measured is intake, not AWS."""
        path = self.dir / "requests-sqs.jsonl"
        later = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 20 * 86400))
        with open(path, "w") as file:
            for number in range(count):
                request = {"id": f"sqs-{number:07}", "source_key_identifier": source_key(0), "not_before": later,
                           "key": f"arn:aws:kms:eu-central-1:111122223333:key/{number % 2000:08}-0000-4000-8000-000000000000",
                           "key_material_description": ""}
                request["key_material_description"] = "x" * max(0, min(190, REQUEST_BYTES - len(json.dumps(request))))
                file.write(json.dumps(request) + "\n")
        return path

    def intake_over_sqs(self, kind, count):
        url, config = self.queues()
        self.fresh_database()
        self.fill(self.idle_requests(count), url)
        self.settle_down()
        if kind == "naive":
            process = start([self.bin / "sqs", "drain", url, count, POLLERS], self.dir / "naive.log",
                            stdout=subprocess.PIPE, text=True)
            try:
                if process.stdout.readline() != "ready\n":
                    sys.exit(f"the bare loop did not start, see {self.dir}/naive.log")
                begun = time.monotonic()
                if process.stdout.readline() != "done\n":
                    sys.exit(f"the bare loop stopped, see {self.dir}/naive.log")
                seconds = time.monotonic() - begun
                process.wait(60)
            finally:
                process.kill()
        else:
            with self.worker(config=config):
                # Ready is when the queue was looked at and the first receives have just begun.
                begun = time.monotonic()
                until(600, "all accepted", lambda: self.metric("keyferry_intake_messages_total") >= count or None, 0.01)
                until(60, "all deleted", lambda: waiting(url) == 0 or None, 0.005)
                seconds = time.monotonic() - begun
            accepted = int(self.sql("select count(*) from job", "-d", "keyferry"))
            if accepted != count:
                sys.exit(f"{accepted} jobs of {count} messages")
        if left := waiting(url):
            sys.exit(f"{left} messages are left of {count}")
        sqs("DeleteQueue", QueueUrl=url)
        run = {"part": "sqs", "kind": kind, "messages": count, "pollers": POLLERS, "seconds": seconds}
        self.runs.append(run)
        say(f"sqs        {kind:7}{count / seconds:8.0f} messages/s, {seconds:.2f} s for {count}")
        return run

    def fill(self, path, url):
        subprocess.run([self.bin / "sqs", "fill", path, url], check=True)

    def memory_over_sqs(self):
        """The worker while it drains: few messages, then as many as are asked for."""
        url, config = self.queues()
        self.fresh_database()
        path = self.idle_requests(self.given.waiting)
        few = self.dir / "few.jsonl"
        with open(path) as all_, open(few, "w") as file:
            file.writelines(line for _, line in zip(range(FEW), all_))
        accepted = lambda: self.metric("keyferry_intake_messages_total")
        self.fill(few, url)
        with self.worker(orderly=False, config=config) as (process, _):
            until(300, "few drained", lambda: accepted() >= FEW or None, 0.1)
            time.sleep(2)
            with_few = memory_kib(process.pid)
        begun = time.monotonic()
        self.fill(path, url)
        filled = time.monotonic() - begun
        with self.worker(orderly=False, config=config) as (process, _):
            # The double looks at every waiting message for each receive: a part shows the worker's memory as well.
            until(600, "a part drained", lambda: accepted() >= FEW or None, 0.1)
            time.sleep(2)
            with_many, left = memory_kib(process.pid), waiting(url)
        found = {"few": with_few, "many": with_many, "messages_waiting": left, "fill_seconds": filled}
        say(f"sqs memory ours    {with_few['VmRSS'] / 1024:.1f} MiB after {FEW} messages, {with_many['VmRSS'] / 1024:.1f} MiB "
            f"with {left} waiting (filled in {filled:.0f} s)")
        return found

    def over_sqs(self):
        kinds = ["naive", "ours"]
        runs = {kind: [] for kind in kinds}
        for number in range(self.given.runs):
            for kind in kinds if number % 2 == 0 else reversed(kinds):
                runs[kind].append(self.intake_over_sqs(kind, self.given.jobs))
        return runs, self.memory_over_sqs()

    def profile(self):
        self.sql("select pg_stat_statements_reset()", "-d", "postgres")
        data, profiler = self.dir / "perf.data", None
        if shutil.which("perf"):
            profiler = ["perf", "record", "-q", "-F", "999", "-o", data, "-p"]
        run = self.measure("ours", self.given.jobs, profiler=profiler)
        self.record("profile", run)
        jobs = run["jobs"]
        text = self.sql(
            f"""select calls, round({jobs} / calls::numeric, 1) as jobs_each, round(total_exec_time::numeric, 1) as ms,
                       round(1000 * total_exec_time::numeric / {jobs}, 1) as us_a_job, rows,
                       shared_blks_hit + shared_blks_read as blocks, wal_bytes, left(regexp_replace(query, '\\s+', ' ', 'g'), 90) as statement
                from pg_stat_statements join pg_database on oid = dbid
                where datname = 'keyferry' and calls > 0 order by total_exec_time desc limit 40""",
            "-d", "postgres", "-P", "format=aligned", "-P", "tuples_only=off")
        (self.dir / "statements.txt").write_text(text + "\n")
        if data.exists():
            report = subprocess.run(["perf", "report", "-i", data, "--stdio", "--percent-limit", "0.3"], capture_output=True, text=True)
            (self.dir / "perf.txt").write_text(report.stdout)
        say(f"profile: {self.dir}/statements.txt" + (f", {self.dir}/perf.txt" if data.exists() else ""))


def sqs(operation, **request):
    """A call to the double of SQS, which looks at no signature and reads the Region from its scope."""
    headers = {"content-type": "application/x-amz-json-1.0", "x-amz-target": f"AmazonSQS.{operation}",
               "authorization": "AWS4-HMAC-SHA256 Credential=bench/20260101/eu-central-1/sqs/aws4_request, "
                                "SignedHeaders=host, Signature=none"}
    call = urllib.request.Request(os.environ["AWS_ENDPOINT_URL_SQS"], json.dumps(request).encode(), headers, method="POST")
    with NO_PROXY.open(call, timeout=60) as answer:
        return json.loads(answer.read() or "null")


def waiting(url):
    """Messages of a queue, in somebody's hand or not."""
    names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
    found = sqs("GetQueueAttributes", QueueUrl=url, AttributeNames=names)["Attributes"]
    return sum(int(found[name]) for name in names)


def source_key(number):
    return f"bench-source-{number}"


# --- the table ----------------------------------------------------------------------------------------------------


def median(runs, *path):
    def value(run):
        for name in path:
            run = run[name]
        return run

    return statistics.median(map(value, runs))


def versions(bench):
    def first_line(*command):
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        return (done.stdout.splitlines() or [""])[0]

    return {
        "commit": first_line("git", "describe", "--always", "--dirty"),
        "rustc": first_line("rustc", "--version"),
        "postgres": bench.sql("select version()", "-d", "postgres"),
        "fsync": bench.sql("show fsync", "-d", "postgres"),
        "rabbitmq": call_management("/api/overview")["rabbitmq_version"],
        "kernel": platform.release(),
        "cores": os.cpu_count(),
    }


def call_management(path):
    url = urllib.parse.urlsplit(os.environ["KEYFERRY_RABBITMQ__API_URL"])
    manager = urllib.request.HTTPPasswordMgrWithPriorAuth()
    base = f"http://{url.hostname}:{url.port}"
    manager.add_password(None, base, url.username, url.password, is_authenticated=True)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPBasicAuthHandler(manager))
    with opener.open(base + path, timeout=30) as answer:
        return json.loads(answer.read())


def throughput_rows(table, ours, naive):
    both = bool(ours and naive)

    def row(what, path, form, compare, target="", good=None, unit=1):
        values = [median(side, *path) / unit if side else None for side in (ours, naive)]
        texts = ["" if value is None else form.format(value) for value in values]
        table.add(what, *texts, compare(*values) if both else "", target, good(*values) if both and good else None)

    row("jobs/s", ["jobs_per_s"], "{:.0f}", lambda a, b: f"{a / b:.2f}x", ">= 0.95x", lambda a, b: a / b >= 0.95)
    for name, target in [("worker", 0.15), ("postgres", 0.10), ("rabbitmq", 0.10), ("fake_kms", None)]:
        row(f"CPU ms per job: {name}", ["cpu_ms_per_job", name], "{:.3f}", lambda a, b: f"{a - b:+.3f}",
            f"<= +{target:.2f}" if target else "", (lambda a, b, most=target: a - b <= most) if target else None)
    row("start to ready, ms", ["ready_ms"], "{:.0f}", lambda a, b: "", "<= 250", lambda a, b: a <= 250)
    row("largest memory, MiB", ["memory_kib", "VmHWM"], "{:.1f}", lambda a, b: "", unit=1024)


def main():
    given = arguments()
    if given.check:
        return
    bench = Bench(given)
    bench.prepare()
    about = {"versions": versions(bench),
             "settings": {**{name: value for name, value in vars(given).items() if name != "check" and value is not None},
                          "in_flight": IN_FLIGHT, "request_bytes": REQUEST_BYTES, "source_keys": SOURCE_KEYS}}
    table, summary = Table(), {}
    if "throughput" in given.parts:
        runs = bench.alternating("throughput")
        throughput_rows(table, runs["ours"], runs["naive"])
        if given.against:
            table.add(f"-- {given.against}", "")
            throughput_rows(table, runs["against"], runs["naive"])
    if "slow" in given.parts:
        one = bench.record("unloaded", bench.measure("naive", 100, SLOW_MS, in_flight=1))
        runs = bench.alternating("slow", SLOW_MS)
        rates = {kind: median(of, "jobs_per_s") for kind, of in runs.items() if of}
        ideal = IN_FLIGHT * 1000 / sum(one["calls_ms"].values())
        summary["slow"] = {"calls_ms": one["calls_ms"], "ideal_jobs_per_s": ideal, **rates}
        table.add(f"jobs/s, KMS at {SLOW_MS} ms", f"{rates['ours']:.0f}", f"{rates['naive']:.0f}",
                  f"{rates['ours'] / rates['naive']:.2f}x")
        table.add(f"  of 64 / {IN_FLIGHT * 1000 / ideal:.1f} ms = {ideal:.0f}", f"{rates['ours'] / ideal:.1%}",
                  f"{rates['naive'] / ideal:.1%}", "", ">= 90%", rates["ours"] / ideal >= 0.9)
    if "latency" in given.parts:
        found = sorted((bench.latency() for _ in range(given.runs)), key=lambda run: run["p99_ms"])
        summary["latency"] = found
        p50, p99 = median(found, "p50_ms"), median(found, "p99_ms")
        table.add(f"p50 ms at {RATE} jobs/s", f"{p50:.1f}", "", "", "<= 12", p50 <= 12)
        table.add(f"p99 ms at {RATE} jobs/s", f"{p99:.1f}", "", "", "<= 30", p99 <= 30)
    if "memory" in given.parts:
        found = summary["memory"] = bench.memory()
        busy, waiting = found["in_flight"]["VmRSS"], found["waiting"]["VmRSS"]
        table.add("memory MiB, 64 in flight", f"{busy / 1024:.1f}", "", "", "<= 40", busy <= 40 * 1024)
        table.add(f"  with {found['jobs_waiting']} waiting", f"{waiting / 1024:.1f}", "", f"{waiting / busy:.2f}x",
                  "<= 1.10x", waiting / busy <= 1.1)
    if "sqs" in given.parts:
        runs, found = bench.over_sqs()
        summary["sqs"] = {"memory": found}
        ours, bare = median(runs["ours"], "seconds"), median(runs["naive"], "seconds")
        table.add(f"SQS: s for {given.jobs} messages", f"{ours:.2f}", f"{bare:.2f}", f"{ours / bare:.2f}x", "<= 1.20x",
                  ours / bare <= 1.2)
        few, many = found["few"]["VmRSS"], found["many"]["VmRSS"]
        table.add("  memory MiB, few in SQS", f"{few / 1024:.1f}")
        table.add(f"  with {found['messages_waiting']} waiting there", f"{many / 1024:.1f}", "", f"{many / few:.2f}x",
                  "<= 1.10x", many / few <= 1.1)
    if "quota" in given.parts:
        summary["quota"] = quota.measure(bench, sys.modules[__name__], table)
    if given.profile:
        bench.profile()
    (bench.dir / "runs.json").write_text(json.dumps({**about, "runs": bench.runs}, indent=1, default=str))
    (bench.dir / "summary.json").write_text(json.dumps({**about, **summary, "table": table.rows}, indent=1, default=str))
    print()
    table.print()
    print(f"\n{given.jobs} jobs a run, median of {given.runs}; raw numbers: {bench.dir}/*.json")


if __name__ == "__main__":
    main()
