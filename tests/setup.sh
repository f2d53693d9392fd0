# Sourced by run.sh and demo.sh: a virtual environment in tests/.env, an Orthanc server where one can be had.
# Sets PYTHON, that of the environment; orthanc.py finds the server.
set -eu
here=$(cd "$(dirname "$0")" && pwd)

# Loopback is never asked for through a proxy.
export NO_PROXY="127.0.0.1,localhost,::1${NO_PROXY:+,$NO_PROXY}"
export no_proxy="$NO_PROXY"

say() { printf '%s\n' "$*" >&2; }

may_install() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; }

apt() {    # quiet unless it fails
    apt_log=$(mktemp)
    if DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 "$@" >"$apt_log" 2>&1; then rm -f "$apt_log"; else
        cat "$apt_log" >&2; rm -f "$apt_log"; return 1
    fi
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

find_python() {
    for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python3.10; do
        if is_new_enough "$candidate"; then command -v "$candidate"; return; fi
    done
    say "Python 3.10 or newer is needed; name one: PYTHON=/path/to/python3 sh $0"
    return 1
}

# Made once, and again when the requirements or the Python change.
make_environment() {
    base=$(find_python)
    env="$here/.env"
    stamp=$(cat "$here/../requirements.txt" "$here/requirements.txt" | cksum)" $("$base" -c 'import sys; print(sys.version, sys.prefix)' | tr '\n' ' ')"
    PYTHON="$env/bin/python"
    if [ -x "$PYTHON" ] && [ "$(cat "$env/stamp" 2>/dev/null)" = "$stamp" ]; then return; fi
    say "Making a virtual environment in $env …"
    rm -rf "$env"
    if ! "$base" -m venv "$env" 2>/dev/null; then
        # Debian keeps the module that venv needs in a package of its own
        if may_install; then apt update && apt install -y python3-venv; fi
        rm -rf "$env"
        "$base" -m venv "$env" || { say "$base cannot make a virtual environment: install python3-venv"; return 1; }
    fi
    "$PYTHON" -m pip install -q --disable-pip-version-check -r "$here/../requirements.txt" -r "$here/requirements.txt" >&2
    printf '%s\n' "$stamp" >"$env/stamp"
}

have_orthanc() {
    case "${ORTHANC_COMMANDS:-Orthanc}" in Orthanc | Orthanc\;*) ;; *) return 0 ;; esac
    command -v Orthanc >/dev/null 2>&1 || [ -x /usr/sbin/Orthanc ] || [ -x /usr/local/sbin/Orthanc ] \
        || { [ -x "$here/.orthanc/usr/sbin/Orthanc" ] && "$here/.orthanc/usr/sbin/Orthanc" --version >/dev/null 2>&1; }
}

# Debian's package is unpacked here, not installed: it would start a DICOM server at every boot. Only the libraries
# that it needs are installed.
get_orthanc() {
    if have_orthanc; then return; fi
    if ! may_install; then
        say "No Orthanc was found, and none can be installed without root and apt: a small stand-in takes its place."
        return
    fi
    say "Fetching Debian's Orthanc (its libraries are installed, the server itself is only unpacked) …"
    unpacked=$(mktemp -d)
    chmod 755 "$unpacked"
    if apt update && (
        cd "$unpacked"
        libraries=$(apt-cache depends --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances orthanc \
            | sed -n 's/^ *Depends: \([a-z0-9][^ <:]*\)$/\1/p' | grep -E '^lib|-data$|^tzdata$|^locales$')
        # shellcheck disable=SC2086 — a list of names
        apt install -y --no-install-recommends $libraries && apt download orthanc && mkdir root && dpkg-deb -x orthanc_*.deb root
    ); then
        rm -rf "$here/.orthanc"
        mv "$unpacked/root" "$here/.orthanc"
    else
        say "Orthanc could not be fetched."
    fi
    rm -rf "$unpacked"
}

make_environment
get_orthanc
export PYTHON
