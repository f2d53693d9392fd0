#!/bin/sh
# Runs the demo and the tests of the present commit as a newcomer would, in systems with nothing but git and Python:
#     sh tests/fresh.sh [release …] [--user]        bookworm (the default), trixie, jammy, noble, …
# As root there; with --user as an ordinary user, for whom root installed python3-venv. Prints one line a system, and
# ends with 1 where one failed, with 3 where none can be made: that needs root, debootstrap and the right to mount.
# Packages come from where this machine's own do (a release of another distribution: MIRROR=http://…), and pip is set
# up as here.
# The bare systems (300 MB each) and the log of each run stay in ~/.cache/store_study_info, or $SERVERS.
here=$(cd "$(dirname "$0")" && pwd)
. "$here/bare.sh"

who=root releases=
for argument in "$@"; do
    case $argument in
        --user) who=user ;;
        *) is_release "$argument" || { say "usage: sh $0 [release …] [--user]"; exit 2; }
           releases="$releases $argument" ;;
    esac
done
need_debootstrap

# Everything runs in namespaces of its own: when the first process there ends, for whatever reason, the others and
# all mounts are gone too, so that removing the folder never reaches what was mounted.
run='' child=''
# shellcheck disable=SC2329  # the trap calls it
clean() {
    [ -z "$child" ] || { kill -KILL "$child"; wait "$child"; } 2>/dev/null || true
    # the last process may still be ending
    for _ in 1 2 3 4 5; do [ -z "$run" ] || rm -rf "$run" 2>/dev/null && break; sleep 1; done
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP
unshare --mount --pid --fork true 2>/dev/null ||
    { say "fresh.sh needs the right to mount: unshare is refused"; exit 3; }
for left in "$folder"/fresh.*; do    # a run that was killed could not remove its folder
    [ ! -d "$left" ] || kill -0 "${left##*.}" 2>/dev/null || rm -rf "$left"
done
run=$folder/fresh.$$
mkdir -m 755 "$run"

# isolated SCRIPT [argument …]: its status; this shell can be interrupted meanwhile, and killed.
isolated() {
    setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child sh -euc "$@" &
    child=$!
    status=0
    wait "$child" || status=$?
    child=
    return "$status"
}

# ---------------------------------------------------------------------------------------------------------------------
# How this machine reaches its registries
# ---------------------------------------------------------------------------------------------------------------------

# Writes pip.conf: all settings of pip on this machine, its environment's included. Prints the files and folders that
# these name, where packages are read from a disk.
PIP_SETTINGS='
import ast, os, sys, urllib.parse, urllib.request

sections, paths = {}, []
for line in sys.stdin:
    name, _, value = line.strip().partition("=")
    if not value.startswith(("\"", "\x27")):
        continue
    section, _, key = name.rpartition(".")
    value = ast.literal_eval(value)
    sections.setdefault("global" if section == ":env:" else section, {}).setdefault(key, value)
    for word in value.split():
        path = urllib.request.url2pathname(urllib.parse.urlsplit(word).path) if word.startswith("file:") else word
        if os.path.isabs(path) and os.path.exists(path):
            # the pages of an index name files beside its folder
            around = os.path.dirname(os.path.normpath(path)) if key.endswith("index-url") else "/"
            paths.append(path if around == "/" else around)
with open(sys.argv[1], "w") as file:
    for section, settings in sections.items():
        print(f"[{section}]", *(f"{key} = " + value.strip().replace("\n", "\n    ") for key, value in settings.items()),
              sep="\n", file=file)
print(*dict.fromkeys(paths), sep="\n")
'

# The machine's settings, into a system; folders to be mounted there are listed in $run/mounts.
take_settings() {
    for file in /etc/resolv.conf /etc/hosts /etc/ssl/certs/ca-certificates.crt; do take_file "$1" "$file"; done
    if [ -d /usr/local/share/ca-certificates ]; then
        mkdir -p "$1/usr/local/share/ca-certificates"
        cp -RL /usr/local/share/ca-certificates/. "$1/usr/local/share/ca-certificates/"
    fi
    set_up_apt "$1"
    : >"$run/mounts"
    # the environment's come first there and are kept
    { python3 -m pip config list || pip config list || true; } 2>/dev/null |
        python3 -c "$PIP_SETTINGS" "$1/etc/pip.conf" | while read -r path; do
            if [ -d "$path" ]; then echo "$path" >>"$run/mounts"; elif [ -n "$path" ]; then take_file "$1" "$path"; fi
        done
    # proxies, and which certificates are believed
    env | grep -iE '^(https?|all|no)_proxy=|^(SSL_CERT_FILE|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE)=' \
        >"$run/environment" || true
    sed -nE 's/^[A-Z_]*(CERT_FILE|CA_BUNDLE)=//p' "$run/environment" |
        while read -r path; do take_file "$1" "$path"; done
}

take_file() {
    [ -f "$2" ] || return 0
    mkdir -p "$(dirname "$1$2")"
    rm -f "$1$2"
    cp -L "$2" "$1$2"
}

# ---------------------------------------------------------------------------------------------------------------------
# A system, and what is run in it
# ---------------------------------------------------------------------------------------------------------------------

# Bare systems are kept; one that was not finished is under another name.
base_of() {
    base=$folder/bare-$1
    if [ -e "$base" ]; then return 0; fi
    say "Making $base …"
    unfinished=$run/base
    # shellcheck disable=SC2016
    isolated '. "$1"; bare "$2" "$3"; chroot "$3" sh -ec "apt-get update
        apt-get install -y --no-install-recommends git python3
        apt-get clean"' sh "$here/bare.sh" "$1" "$unfinished" >"$base.log" 2>&1 || return 1
    mv "$unfinished" "$base"
}

# inside LOG USER COMMAND: in the system in $root, from the clone, with a newcomer's environment.
# shellcheck disable=SC2016
INSIDE='
root=$1 mounts=$2 environment=$3 user=$4 home=$5 command=$6
mount -t proc proc "$root/proc"
mkdir -p "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$root/dev/pts"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
while read -r path; do
    mkdir -p "$root$path"
    mount --bind -o ro "$path" "$root$path"
done <"$mounts"
set -- HOME="$home" USER="$user" TERM=dumb PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
while read -r setting; do set -- "$@" "$setting"; done <"$environment"
exec </dev/null
timeout 1500 chroot --userspec="$user" "$root" env -i "$@" sh -c "cd ~/store_study_info 2>/dev/null; $command"
exit $?    # stays the first process, which takes in what others leave
'
inside() { isolated "$INSIDE" sh "$root" "$run/mounts" "$run/environment" "$2" "$(home_of "$2")" "$3" >"$1" 2>&1; }
home_of() { if [ "$1" = root ]; then echo /root; else echo "/home/$1"; fi; }

wrong() { problems="${problems:+$problems; }$1"; }
no_traceback() { ! grep -q '^Traceback' "$1" || wrong "a traceback in $1"; }
count() { sed -n "s/^=.*[ =]\([0-9]*\) $1.* in .*=$/\1/p" "$2" | tail -n 1; }
megabytes() { du -sm "$1" | cut -f 1; }
left_behind() {
    in_clone=$(($(megabytes "$root$home/store_study_info") - clone))
    echo "$in_clone MB in the clone and $(($(megabytes "$root") - before - in_clone)) MB in the system"
}

# try RELEASE: prints its line.
try() {
    root=$run/root log=$folder/fresh-$1-$who problems=''
    rm -rf "$root"
    base_of "$1" || { echo "$1, $who: cannot be made: $(tail -n 1 "$base.log") (see $base.log)"; return 1; }
    cp -a "$base" "$root"
    take_settings "$root"
    newcomer=root
    if [ "$who" = user ]; then
        newcomer=newcomer
        chroot "$root" useradd --create-home newcomer
    fi
    home=$(home_of "$newcomer")
    # git refuses a clone of somebody else's otherwise
    printf '[safe]\n\tdirectory = *\n' >"$run/.gitconfig"
    HOME="$run" git clone -q --no-hardlinks "$here/.." "$root$home/store_study_info"
    [ "$who" = root ] || chroot "$root" chown -R newcomer: "$home/store_study_info"
    [ "$who" = root ] || without_venv
    before=$(megabytes "$root") clone=$(megabytes "$root$home/store_study_info")

    began=$(date +%s)
    inside "$log-demo.log" "$newcomer" "sh tests/demo.sh" || wrong "the demo ended with $?"
    demo_seconds=$(($(date +%s) - began))
    no_traceback "$log-demo.log"
    server=$(sed -n 's/^\(.*\) answers at .*/\1/p' "$log-demo.log" | head -n 1)
    [ -n "$server" ] || wrong "no server answered the demo"
    demo_left=$(left_behind)

    required=0
    case $who:$server:$1 in
        root:Orthanc*) required=1 ;;
        root:*:jammy | root:*:noble | user:*) ;;
        *) wrong "the demo had no Orthanc" ;;
    esac
    began=$(date +%s)
    inside "$log-tests.log" "$newcomer" "REQUIRE_ORTHANC=$required sh tests/run.sh" || wrong "the tests ended with $?"
    tests_seconds=$(($(date +%s) - began))
    no_traceback "$log-tests.log"
    passed=$(count passed "$log-tests.log") failed=$(count failed "$log-tests.log")
    errors=$(count error "$log-tests.log")
    [ "${passed:-0}" -ge 200 ] || wrong "fewer than 200 tests passed"

    tests_left=$(left_behind)
    inside "$log-git.log" "$newcomer" "git status --porcelain" || wrong "git status ended with $?"
    [ ! -s "$log-git.log" ] || wrong "the clone is not clean: $(head -n 3 "$log-git.log" | tr '\n' ' ')"
    [ "$who$required" != root1 ] || without_libraries

    say "$1, $who: the demo leaves $demo_left; with the tests $tests_left"
    echo "$1, $who: demo on ${server:-nothing}, $demo_seconds s;" \
        "tests ${passed:-0} passed, $((${failed:-0} + ${errors:-0})) failed, $tests_seconds s;" \
        "${problems:-all is well, the clone is clean}"
    [ -n "$problems" ] || return 0
    for file in "$log-demo.log" "$log-tests.log"; do say "--- the end of $file:"; tail -n 30 "$file" >&2; done
    return 1
}

# Without python3-venv an ordinary user reads one sentence; then root installs it.
without_venv() {
    for script in demo run; do
        if inside "$log-venv.log" newcomer "sh tests/$script.sh" || ! grep -q python3-venv "$log-venv.log" ||
                [ "$(wc -l <"$log-venv.log")" != 1 ]; then
            wrong "without python3-venv $script.sh does not end in one sentence: $(tail -n 1 "$log-venv.log")"
        fi
    done
    inside "$log-venv.log" root "apt-get update && apt-get install -y --no-install-recommends python3-venv" ||
        wrong "python3-venv could not be installed, see $log-venv.log"
}

# With a library of Orthanc gone the demo says so and goes on with the stand-in.
without_libraries() {
    # shellcheck disable=SC2016
    inside "$log-library.log" root 'mkdir /away; mv $(find /usr/lib -name "libboost*") /away; sh tests/demo.sh' ||
        wrong "without Orthanc's libraries the demo ended with $?"
    no_traceback "$log-library.log"
    if ! grep -q 'Orthanc .*does not start.*stand-in' "$log-library.log" || ! grep -q '^A stand-in' "$log-library.log"
    then
        wrong "without Orthanc's libraries the demo does not say so, see $log-library.log"
    fi
}

ended=0
for release in ${releases:-bookworm}; do try "$release" || ended=1; done
exit "$ended"
