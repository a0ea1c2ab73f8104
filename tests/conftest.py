"""Fixtures that several test files use, and a machine that is the same wherever the tests are started.

There is no network but the loopback, and signals do what they do in a terminal: a shell that starts pytest with & or nohup
makes it ignore some of them.

pytest-xdist imports this file once more than it has workers, so PyTorch is imported where it is used.
"""

import os
import signal
import socket
from functools import partial

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # before these libraries are imported

import pytest

from support.grade import Grader

# A worker's imports take seconds, and toy answers need none. Evaluations in a Python of their own do check the grader.
Grader.check = lambda self: None

for signum, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(signum) == signal.SIG_IGN:
        signal.signal(signum, handler)

connect, getaddrinfo = socket.socket.connect, socket.getaddrinfo


def connect_here(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and not address[0].startswith(("127.", "::1", "localhost")):
        raise OSError(f"no network in tests: {address}")
    return connect(self, address)


def getaddrinfo_here(host, *args, **options):
    if host not in (None, "", "localhost", "127.0.0.1", "::1", socket.gethostname()):
        raise socket.gaierror(f"no network in tests: {host}")
    return getaddrinfo(host, *args, **options)


socket.socket.connect, socket.getaddrinfo = connect_here, getaddrinfo_here


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Folders of a random teacher and a random student with the toy's tokenizer."""
    from scenes import save_random_pair

    return save_random_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def scene(pair):
    """make(**options): scenes.make_scene of the random pair"""
    from scenes import make_scene

    return partial(make_scene, pair)
