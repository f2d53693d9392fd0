#!/bin/sh
# Runs the tests, on a machine with nothing but Python (and, for Orthanc, root and apt): sh tests/run.sh [pytest's arguments]
# Other versions of Orthanc: ORTHANC_COMMANDS="chroot DIR Orthanc; …", see servers.sh.
. "$(dirname "$0")/setup.sh"
cd "$here"
exec "$PYTHON" -m pytest -c pytest.ini -n "${WORKERS:-2}" --dist loadfile "$@"
