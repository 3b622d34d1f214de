"""The Debian documentation packages of the sample: where their pages lie and where on the web they come
from.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """One documentation package: name, directory of its pages when unpacked, and the URL that they are
    served under.
    """

    name: str
    pages: str
    url: str
    language: str = "en"


DEBIAN = "https://www.debian.org/doc/manuals/"
PACKAGES = (
    Package("python3.11-doc", "usr/share/doc/python3.11/html", "https://docs.python.org/3/"),
    Package(
        "postgresql-doc-15", "usr/share/doc/postgresql-doc-15/html", "https://www.postgresql.org/docs/15/"
    ),
    Package("sqlite3-doc", "usr/share/doc/sqlite3", "https://www.sqlite.org/"),
    Package("git-doc", "usr/share/doc/git-doc", "https://git-scm.com/docs/"),
    Package("developers-reference", "usr/share/developers-reference", DEBIAN + "developers-reference/"),
    Package(
        "python-django-doc", "usr/share/doc/python-django-doc/html", "https://docs.djangoproject.com/en/3.2/"
    ),
    Package("debian-handbook", "usr/share/doc/debian-handbook/html", "https://debian-handbook.info/browse/"),
    Package("debian-reference-de", "usr/share/debian-reference", DEBIAN + "debian-reference/", "de"),
    Package("debian-reference-fr", "usr/share/debian-reference", DEBIAN + "debian-reference/", "fr"),
    Package("debian-reference-ja", "usr/share/debian-reference", DEBIAN + "debian-reference/", "ja"),
    Package("debian-reference-zh-cn", "usr/share/debian-reference", DEBIAN + "debian-reference/", "zh"),
    Package("debian-faq-de", "usr/share/doc/debian/FAQ/de", DEBIAN + "debian-faq/", "de"),
    Package("debian-faq-fr", "usr/share/doc/debian/FAQ/fr", DEBIAN + "debian-faq/", "fr"),
    Package("debian-faq-it", "usr/share/doc/debian/FAQ/it", DEBIAN + "debian-faq/", "it"),
    Package("debian-faq-ja", "usr/share/doc/debian/FAQ/ja", DEBIAN + "debian-faq/", "ja"),
    Package("debian-faq-ru", "usr/share/doc/debian/FAQ/ru", DEBIAN + "debian-faq/", "ru"),
    Package("debian-faq-zh-cn", "usr/share/doc/debian/FAQ/zh-cn", DEBIAN + "debian-faq/", "zh"),
    Package("maint-guide-zh-cn", "usr/share/doc/maint-guide-zh-cn/html", DEBIAN + "maint-guide/", "zh"),
)
BY_NAME = {package.name: package for package in PACKAGES}


def unpacked(directory: Path) -> dict[str, Path]:
    """Package name -> root of its unpacked files, for every `NAME_VERSION_ARCH` directory in `directory`."""
    found = {path.name.split("_")[0]: path for path in sorted(directory.iterdir()) if path.is_dir()}
    return {name: found[name] for name in BY_NAME if name in found}


def page_paths(root: Path, package: Package) -> list[str]:
    """Relative paths of the package's own pages, sorted; symbolic links (second names of a page) left out."""
    top = root / package.pages
    # rglob of Python < 3.13 does not follow links to directories, so every page is met once.
    return sorted(
        str(path.relative_to(top))
        for path in top.rglob("*.html")
        if path.is_file() and not path.is_symlink() and not path.resolve().is_relative_to(top / "_static")
    )
