#!/bin/sh
# Runs the tests, on a machine with nothing but Python (for Orthanc root and apt): sh tests/run.sh [arguments of pytest]
# Other versions of Orthanc: ORTHANC_COMMANDS="chroot DIR Orthanc; …", see servers.sh; none: ORTHANC_COMMANDS=stand-in
purpose=tests
. "$(dirname "$0")/setup.sh"
cd "$here"
exec "$PYTHON" -m pytest -c pytest.ini -n "${WORKERS:-2}" --dist loadfile "$@"
