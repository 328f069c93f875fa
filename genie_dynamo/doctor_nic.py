"""`genie doctor --nic`: what the dpdk lane could use on this machine, and what is missing for it.

Everything is read from /proc and /sys; no driver is bound and no page reserved.
"""
from __future__ import annotations

from pathlib import Path

from genie_dynamo.doctor import Check, Report
from genie_dynamo.runtime.lanes import dpdk

KERNEL_BYPASS_DRIVERS = frozenset({"vfio-pci", "uio_pci_generic", "igb_uio"})
# Vendors whose DPDK drivers share the NIC with the kernel's.
BIFURCATED = {"0x15b3": "mlx5"}
ETHERNET_CLASS = "0x0200"
MEMORY_MB = 128


def examine(root: Path = Path("/")) -> Report:
    """Look. `root` is where /proc and /sys are, for tests."""
    return Report((_library(), _hugepages(root), _iommu(root), *_nics(root), *_interfaces(root)))


def _library() -> Check:
    if dpdk.module() is None:
        return Check(name="dpdk", status="off", value="not in this build", detail=dpdk.why_not())
    return Check(name="dpdk", status="ok", value="built in", detail=dpdk.why_not())


def _hugepages(root: Path) -> Check:
    facts = dict(line.split(":", 1) for line in _read(root / "proc/meminfo").splitlines() if ":" in line)
    free, size_kb = (int(facts.get(name, "0").split()[0]) for name in ("HugePages_Free", "Hugepagesize"))
    mounted = any(" hugetlbfs " in line for line in _read(root / "proc/mounts").splitlines())
    value = f"{free * size_kb // 1024} MB free, hugetlbfs {'mounted' if mounted else 'not mounted'}"
    if free * size_kb >= MEMORY_MB * 1024 and mounted:
        return Check(name="hugepages", status="ok", value=value)
    pages = MEMORY_MB * 1024 // (size_kb or 2048)
    return Check(name="hugepages", status="off", value=value,
                 detail=f"virtual ports do without; NICs need them: sysctl vm.nr_hugepages={pages}, and "
                        "mount -t hugetlbfs none /dev/hugepages")


def _iommu(root: Path) -> Check:
    groups = _names(root / "sys/kernel/iommu_groups")
    if groups:
        return Check(name="iommu", status="ok", value=f"{len(groups)} groups")
    return Check(name="iommu", status="off", value="none",
                 detail="vfio-pci needs one (intel_iommu=on iommu=pt, or amd_iommu=on); mlx5 does without")


def _nics(root: Path) -> list[Check]:
    checks = []
    for address in _names(root / "sys/bus/pci/devices"):
        device = root / "sys/bus/pci/devices" / address
        if not _read(device / "class").startswith(ETHERNET_CLASS):
            continue
        vendor = _read(device / "vendor").strip()
        driver = (device / "driver").resolve().name if (device / "driver").exists() else "none"
        usable = driver in KERNEL_BYPASS_DRIVERS or vendor in BIFURCATED
        detail = (f"GENIE_DPDK_PORT=pci:{address}; not verified on hardware" if usable
                  else f"bind it to vfio-pci for pci:{address} (the kernel loses it), or use af_packet or af_xdp on it")
        checks.append(Check(name=f"nic {address}", status="ok" if usable else "off",
                            value=f"vendor {vendor}, driver {driver}", detail=detail))
    return checks or [Check(name="nic", status="off", value="no Ethernet device on the PCI bus")]


def _interfaces(root: Path) -> list[Check]:
    checks = []
    for name in _names(root / "sys/class/net"):
        if name == "lo":
            continue
        device = root / "sys/class/net" / name
        mtu = int(_read(device / "mtu").strip() or 0)
        fits = 0 < mtu <= 3542
        kinds = f"af_packet:{name}" + (f", af_xdp:{name}" if fits else "; af_xdp wants an MTU of at most 3542")
        checks.append(Check(name=f"interface {name}", status="ok",
                            value=f"MTU {mtu}, {_read(device / 'operstate').strip() or 'state unknown'}", detail=kinds))
    return checks


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
