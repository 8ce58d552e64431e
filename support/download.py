"""Downloads: Pascal VOC and published weights.

download_voc("data")
weights = fetch_weights(VGG16_WEIGHTS, "train from scratch with --no-pretrained")
"""

import errno
import os
import socket
import tarfile
from contextlib import suppress

import torch

from support.files import InputError, make_folder

# The archives of Pascal VOC: year, name, MD5 from torchvision.datasets.VOCDetection.
VOC_ARCHIVES = (
    ("voc2007", "VOCtrainval_06-Nov-2007.tar", "c52e279531787c972589f7e41ab4ae64"),
    ("voc2007", "VOCtest_06-Nov-2007.tar", "b6e924de25625d8de591ea690078ad9f"),
    ("voc2012", "VOCtrainval_11-May-2012.tar", "6cd6e144f989b92b3379bac3b3de84fd"),
)
VOC_MIRRORS = (
    "https://thor.robots.ox.ac.uk/pascal/VOC/{year}/{name}",
    "http://host.robots.ox.ac.uk/pascal/VOC/{year}/{name}",
    "https://pjreddie.com/media/files/{name}",
)
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO)
# torchvision's VGG16_Weights.IMAGENET1K_V1 and SSD300_VGG16_Weights.COCO_V1.
VGG16_WEIGHTS = "https://download.pytorch.org/models/vgg16-397923af.pth"
COCO_WEIGHTS = "https://download.pytorch.org/models/ssd300_vgg16_coco-b556d3b4.pth"


def download_voc(folder, archives=VOC_ARCHIVES, mirrors=VOC_MIRRORS, patience=60):
    """Download and unpack archives, unless that was done before.

    :param folder: gets the archives, and the folder VOCdevkit from them
    :param archives: (year, name, MD5) of each
    :param mirrors: URLs with {year} and {name}, to try in turn
    :param patience: seconds without an answer after which the next mirror is tried
    :raises InputError: naming the file to put in place if no mirror has it, or the archive if it cannot be unpacked
    """
    from torchvision.datasets.utils import check_integrity  # only here, because it takes a second

    make_folder(folder)
    # Unpacked earlier, and not removed since. Looked up first, because the first archive of a year makes the folder.
    existing = {year for year, *_ in archives if os.path.isdir(os.path.join(folder, "VOCdevkit", year.upper()))}
    for year, name, md5 in archives:
        path = os.path.join(folder, name)
        unpacked_marker = f"{path}.unpacked"
        if os.path.exists(unpacked_marker) and year in existing:
            continue
        if not check_integrity(path, md5):
            _download(path, md5, [mirror.format(year=year, name=name) for mirror in mirrors], patience)
        print(f"unpacking {path}", flush=True)
        try:
            with tarfile.open(path) as archive:
                archive.extractall(folder, filter="data")  # refuses names that lead out of the folder
        except (tarfile.TarError, EOFError) as error:
            raise InputError(f"{path}: cannot be unpacked ({error}); remove it and try again") from error
        open(unpacked_marker, "wb").close()


def _download(path, md5, urls, patience):
    """Download a file from the first URL that has it whole; raises InputError if none has."""
    from torchvision.datasets.utils import download_url

    folder, name = os.path.split(path)
    failures = []
    for url in urls:
        print(f"fetching {url}", flush=True)
        earlier_patience = socket.getdefaulttimeout()
        socket.setdefaulttimeout(patience)  # torchvision's download waits for ever
        try:
            download_url(url, folder, f"{name}.part", md5)
            os.replace(f"{path}.part", path)
            return
        except Exception as error:  # servers fail in many ways
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise  # no other mirror can help
            failures.append(f"{url}: {_first_line(error)}")
        finally:
            socket.setdefaulttimeout(earlier_patience)
            with suppress(OSError):
                os.remove(f"{path}.part")
    raise InputError(f"{path}: cannot be fetched ({'; '.join(failures)}); put this file in place and try again")


def fetch_weights(url, alternative):
    """Return the state dict of published weights, which are downloaded once, checked and cached.

    :param url: of torchvision's weights; the name of the file ends in its checksum
    :param alternative: what the user can do without them, for the error
    :raises InputError: naming the cache file to put in place, if they cannot be downloaded
    """
    cache_file = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except Exception as error:  # the network, the disk and a broken file raise different errors
        raise InputError(
            f"cannot get torchvision's weights ({_first_line(error)}): save {url} as {cache_file}, or {alternative}"
        ) from error


def _first_line(error):
    """Return the first line of an error's text, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
