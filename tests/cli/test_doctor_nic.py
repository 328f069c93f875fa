"""`genie doctor --nic` on machines made of files."""
from __future__ import annotations

from pathlib import Path

import pytest

from genie_dynamo import doctor_nic


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    write(tmp_path / "proc/meminfo", "MemTotal: 100 kB\nHugePages_Free:  64\nHugepagesize: 2048 kB\n")
    write(tmp_path / "proc/mounts", "none /dev/hugepages hugetlbfs rw 0 0\n")
    for address, vendor, driver in (("0000:01:00.0", "0x15b3", "mlx5_core"), ("0000:02:00.0", "0x8086", "ice"),
                                    ("0000:03:00.0", "0x8086", "vfio-pci")):
        device = tmp_path / "sys/bus/pci/devices" / address
        write(device / "class", "0x020000\n")
        write(device / "vendor", f"{vendor}\n")
        (tmp_path / "drivers" / driver).mkdir(parents=True)
        (device / "driver").symlink_to(tmp_path / "drivers" / driver)
    write(tmp_path / "sys/bus/pci/devices/0000:04:00.0/class", "0x030000\n")
    for name, mtu in (("lo", 65536), ("eth0", 1500), ("eth1", 9000)):
        write(tmp_path / "sys/class/net" / name / "mtu", f"{mtu}\n")
    return tmp_path


def test_each_nic_is_judged_by_its_driver(machine: Path) -> None:
    by_name = {check.name: check for check in doctor_nic.examine(machine).checks}
    assert by_name["nic 0000:01:00.0"].usable, "mlx5 shares the NIC with the kernel"
    assert "not verified on hardware" in by_name["nic 0000:01:00.0"].detail
    assert not by_name["nic 0000:02:00.0"].usable
    assert "vfio-pci" in by_name["nic 0000:02:00.0"].detail
    assert by_name["nic 0000:03:00.0"].usable
    assert "nic 0000:04:00.0" not in by_name
    assert by_name["hugepages"].usable
    assert not by_name["iommu"].usable


def test_af_xdp_is_offered_where_frames_fit_a_page(machine: Path) -> None:
    by_name = {check.name: check for check in doctor_nic.examine(machine).checks}
    assert "af_xdp:eth0" in by_name["interface eth0"].detail
    assert "af_xdp:eth1" not in by_name["interface eth1"].detail
    assert "interface lo" not in by_name


def test_too_few_hugepages_say_how_to_get_them(machine: Path) -> None:
    (machine / "proc/meminfo").write_text("HugePages_Free: 1\nHugepagesize: 2048 kB\n")
    check = next(check for check in doctor_nic.examine(machine).checks if check.name == "hugepages")
    assert not check.usable
    assert "vm.nr_hugepages=64" in check.detail
