"""check.py KEYFERRY: what Dockerfile and docker-compose.yml name is there, and Keyferry takes its settings from it."""

import fnmatch
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from ruamel.yaml import YAML

DOCKERFILE = pathlib.Path("ops/docker/Dockerfile")
found = []


def say(condition, sentence):
    if not condition:
        found.append(sentence)


def compose():
    """The file as Compose reads it with an empty environment: `${NAME:-default}` stands for its default."""
    text = pathlib.Path("docker-compose.yml").read_text()
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)
    left = re.findall(r"(?<!\$)\$\{?\w+", text)
    say(not left, f"docker-compose.yml: without a default: {left}")
    return YAML(typ="safe").load(text)


def ignored(path):
    """Whether .dockerignore keeps it out of the build: the last pattern that fits decides."""
    verdict = False
    for line in pathlib.Path(".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            kept, pattern = line.startswith("!"), line.removeprefix("!")
            if fnmatch.fnmatch(path, pattern) or path.startswith(f"{pattern}/") or kept and pattern.startswith(f"{path}/"):
                verdict = not kept
    return verdict


def images():
    """Stages of the Dockerfile; all that is copied into the first one is there."""
    text = DOCKERFILE.read_text()
    for line in re.findall(r"^COPY (?!--from)(.*)", text, re.M):
        for source in line.split()[:-1]:
            say(pathlib.Path(source).exists(), f"{DOCKERFILE}: COPY {source}: is not there")
            say(not ignored(source), f"{DOCKERFILE}: COPY {source}: .dockerignore keeps it out")
    return re.findall(r"^FROM \S+ AS (\S+)", text, re.M)


def services(file, stages):
    volumes = file["volumes"]
    for name, service in file["services"].items():
        build = service.get("build")
        ours = [other["image"] for other in file["services"].values() if other.get("build")]
        say(service["image"] in ours or re.search(r":v?\d", service["image"]), f"{name}: its image has no version")
        if build:
            built = [other for other in file["services"].values() if other.get("build") and other["image"] == service["image"]]
            say(len(built) == 1, f"{name}: its image is built twice")
            say(build["target"] in stages, f"{name}: {DOCKERFILE} has no stage {build['target']}")
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            there = pathlib.Path(source).exists() if source.startswith(".") else source in volumes
            say(there, f"{name}: {source} is not there")
        for port in service.get("ports", []):
            say(port.startswith("127.0.0.1:"), f"{name}: port {port} is open to the network")
        for other, how in service.get("depends_on", {}).items():
            needed = file["services"].get(other)
            say(needed, f"{name}: depends on {other}, which is not there")
            if needed and how["condition"] == "service_healthy":
                checked = needed.get("healthcheck") or (needed.get("build") or {}).get("target") == "worker"
                say(checked, f"{name}: waits for {other}, which has no health check")


def settings(file, program):
    """`config check` is told the same settings; only the key's file has to be another."""
    for name in ["worker", "setup"]:
        with tempfile.TemporaryDirectory() as folder:
            kek = pathlib.Path(folder, "kek")
            kek.write_text("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=")
            kek.chmod(0o600)
            environment = {"PATH": os.environ["PATH"], **file["services"][name]["environment"],
                           "KEYFERRY_KEYS__KEK_FILE": str(kek)}
            checked = subprocess.run([program, "config", "check"], env=environment, cwd=folder, capture_output=True, text=True)
            say(checked.returncode == 0, f"{name}: config check: {checked.stdout}{checked.stderr}")


def main():
    file, stages = compose(), images()
    services(file, stages)
    settings(file, sys.argv[1])
    script = file["services"]["setup"]["command"][0]
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    say(checked.returncode == 0, f"setup: {checked.stderr}")
    for sentence in found:
        print(sentence, file=sys.stderr)
    print(f"{len(file['services'])} services, {len(stages)} stages, {len(found)} faults")
    return 1 if found else 0


sys.exit(main())
