"""Audit of the locked dependencies against PyPI's vulnerability database, with pip-audit.

Usage: audit.py LOCK [option of pip-audit ...]. Exit status: 0 if nothing is known, 1 if something is, 2 if pip-audit
failed, 3 if the database could not be asked about all of them.
"""

import json
import subprocess
import sys

UNREACHABLE = ("ConnectionError", "ProxyError", "ServiceError", "Timeout", "HTTPError")


def audit(lock: str, options: list[str]) -> int:
    """Print the vulnerabilities found, or one line if there are none, and return the exit status."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", lock, "--disable-pip", "--progress-spinner", "off"]
    run = subprocess.run([*command, "--format", "json", *options], capture_output=True, text=True)
    try:
        packages = json.loads(run.stdout)["dependencies"]
    except ValueError:
        if any(name in run.stderr for name in UNREACHABLE):
            print(f"not audited: the vulnerability database cannot be reached ({run.stderr.splitlines()[-1]})")
            return 3
        print(f"not audited: pip-audit failed: {run.stderr.strip()}")
        return 2
    found = [(package, one) for package in packages for one in package.get("vulns", ())]
    for package, one in found:
        fixed = f"fixed in {', '.join(one['fix_versions'])}" if one["fix_versions"] else "not fixed yet"
        print(f"{package['name']} {package['version']}: {one['id']}, {fixed}")
    # pip-audit itself takes a package without an answer for a sound one
    unknown = [package["name"] for package in packages if "skip_reason" in package]
    if len(unknown) == len(packages):
        print("not audited: the vulnerability database cannot be reached (no answer about any package)")
    elif unknown:
        print(f"not audited, the vulnerability database does not know them: {', '.join(unknown)}")
    elif not found:
        print(f"no known vulnerability in {len(packages)} packages")
    return 1 if found else 3 if unknown or not packages else 0


if __name__ == "__main__":
    sys.exit(audit(sys.argv[1], sys.argv[2:]))
