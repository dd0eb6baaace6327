"""Download a source distribution through pip's own configuration, without running anything in it.

`pip download` prepares metadata, which runs the project's setup.py. Here pip only resolves the address and
opens the connection, so that indexes, mirrors, find-links, certificates, proxies and credentials are the
user's own.
The child process keeps pip's internals out of this one and gives the whole download a time limit.
"""

import os
import subprocess
import sys
from pathlib import Path


def download_sdist(
    project: str, version: str, destination: Path, *, connect_timeout: int = 10, timeout: float = 900
) -> None:
    """Write the source distribution of project==version, as pip finds it, to the file `destination`.

    Args:
        project: name on the package index.
        version: the exact version.
        destination: file to write; the caller checks its digest.
        connect_timeout: seconds without a byte before pip gives up; it tries each index twice.
        timeout: seconds for the whole download.

    Raises:
        RuntimeError: pip is missing, found no such file, or the download failed or took too long.
    """
    command = [sys.executable, __file__, project, version, str(destination), str(connect_timeout)]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    try:
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"pip did not deliver {project}=={version} within {timeout:g} seconds") from None
    if child.returncode != 0:
        last_line = (child.stderr.strip() or "no message").splitlines()[-1]
        raise RuntimeError(f"pip could not deliver {project}=={version}: {last_line}")


def _download_with_pip(project: str, version: str, destination: str, connect_timeout: str) -> None:
    from pip._internal.commands import create_command
    from pip._vendor.packaging.specifiers import SpecifierSet

    command = create_command("download")
    options, _ = command.parse_args(
        ["--no-deps", "--no-binary", ":all:", "--timeout", connect_timeout, "--retries", "1", project]
    )
    with command.main_context():
        session = command.get_default_session(options)
        finder = command._build_package_finder(options, session)
        found = finder.find_best_candidate(project, SpecifierSet(f"=={version}")).best_candidate
        if found is None:
            sys.exit("no configured package index has it or can be reached")
        response = session.get(found.link.url_without_fragment, stream=True)
        response.raise_for_status()
        with open(destination, "wb") as file:
            for block in response.iter_content(1 << 20):
                file.write(block)


if __name__ == "__main__":
    _download_with_pip(*sys.argv[1:])
