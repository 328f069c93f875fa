"""Real text that every machine has: the docstrings of the standard library."""

from __future__ import annotations

import argparse
import asyncio
import collections
import concurrent.futures
import contextlib
import csv
import datetime
import decimal
import difflib
import email.message
import functools
import heapq
import inspect
import itertools
import json
import logging
import math
import pathlib
import random
import socket
import statistics
import subprocess
import tarfile
import textwrap
import threading
import zipfile

_MODULES = (
    argparse, asyncio, collections, concurrent.futures, contextlib, csv, datetime, decimal, difflib, email.message,
    functools, heapq, itertools, json, logging, math, pathlib, random, socket, statistics, subprocess, tarfile,
    textwrap, threading, zipfile,
)  # fmt: skip


def docstrings() -> list[str]:
    """The docstrings of public functions, classes and methods, sorted, each once."""
    found = set()
    for module in _MODULES:
        for _, item in inspect.getmembers(module, _has_docstring):
            members = [item, *vars(item).values()] if inspect.isclass(item) else [item]
            found |= {text for member in members if (text := inspect.getdoc(member))}
    return sorted(found)


def sentences(count: int) -> list[str]:
    """`count` first lines of docstrings, spread over the sorted list so that the lengths differ."""
    lines = sorted({text.splitlines()[0] for text in docstrings() if len(text.splitlines()[0]) > 20})
    assert len(lines) >= count, f"{len(lines)} sentences found, {count} asked for"
    return lines[:: len(lines) // count][:count]


def _has_docstring(item: object) -> bool:
    return (inspect.isroutine(item) or inspect.isclass(item)) and bool(item.__doc__)
