"""The built site, in a browser. `mkdocs build --strict` makes it; without it these are skipped."""

import functools
import http.server
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zlib
from importlib import resources

import pytest
from site_names import ROOT, address, documented, pages, public_names, resolve

SITE = ROOT / "site"
DESKTOP, PHONE = (1280, 900), (390, 844)
HANDFUL = ("", "getting-started/", "how-dit-works/", "api/blocks/", "benchmarks/", "shapes/")


def _missing():
    if not (SITE / "objects.inv").is_file():
        return "site/ is not built"
    for module in ("selenium", "axe_core_python", "linkcheck"):
        try:
            resources.files(module)
        except ModuleNotFoundError:
            return f"{module} is not installed"
    return None if shutil.which("chromedriver") else "chromedriver is not installed"


if reason := _missing():
    if "REQUIRE_SITE" in os.environ:
        raise RuntimeError(f"REQUIRE_SITE is set, but {reason}")
    pytest.skip(reason, allow_module_level=True)


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass

    def end_headers(self):
        # Else LinkChecker asks but a few times a second.
        self.send_header("LinkChecker", "welcome")
        super().end_headers()


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """Browsers hang up as they like."""


@pytest.fixture(scope="module")
def base():
    handler = functools.partial(_Handler, directory=str(SITE))
    with _Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


class Browser:
    """Headless Chromium, which remembers what pages asked for and complained of."""

    def __init__(self, base):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        if chromium := shutil.which("chromium"):
            options.binary_location = chromium
        for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
            options.add_argument(f"--{argument}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        self.driver = webdriver.Chrome(options, service)
        self.driver.set_page_load_timeout(60)
        self.driver.set_script_timeout(60)
        self.base = base

    def look(self, size=DESKTOP, scheme="light"):
        """Another width, and light or dark."""
        width, height = size
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size is PHONE},
        )
        self.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
        )

    def open(self, page):
        self.driver.get(self.base + page)

    def js(self, code, *arguments):
        return self.driver.execute_script(f"return {code}", *arguments)

    def complaints(self):
        """Errors on the console, and requests to other hosts, since the last call."""
        found = [e["message"] for e in self.driver.get_log("browser") if e["level"] != "INFO"]
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                url = message["params"]["request"]["url"]
                if not url.startswith((self.base, "data:", "blob:")):
                    found.append(f"request to {url}")
        return found


@pytest.fixture(scope="module")
def browser(base):
    browser = Browser(base)
    yield browser
    browser.driver.quit()


@pytest.mark.parametrize(("size", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")])
def test_every_page_is_whole(browser, size, scheme):
    browser.look(size, scheme)
    browser.complaints()
    wrong = {}
    for page in map(address, pages()):
        browser.open(page)
        found = browser.complaints()
        if browser.js("document.documentElement.scrollWidth > innerWidth"):
            found.append("wider than the screen")
        if browser.js("document.body.dataset.mdColorScheme") != {"light": "default"}.get(
            scheme, "slate"
        ):
            found.append(f"not in {scheme} colours")
        if browser.js(
            "[...document.querySelectorAll('.arithmatex')].some(e => !e.querySelector('.katex'))"
        ) or browser.js("document.querySelector('.katex-error') !== null"):
            found.append("maths that is not drawn")
        if found:
            wrong[page] = found
    assert not wrong


def test_maths_is_drawn(browser):
    browser.look()
    browser.open("how-dit-works/")
    assert browser.js("document.querySelectorAll('.katex').length") > 5


def test_search_finds_a_class(browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    browser.look()
    browser.open("")
    browser.driver.find_element(By.CSS_SELECTOR, "input.md-search__input").send_keys(
        "AdaLNZeroBlock"
    )
    link = "a.md-search-result__link[href*='equidit.AdaLNZeroBlock']"
    WebDriverWait(browser.driver, 30).until(
        lambda driver: driver.find_elements(By.CSS_SELECTOR, link)
    )


def test_signatures_show_shapes(browser):
    browser.open("api/blocks/")
    texts = browser.js("[...document.querySelectorAll('.doc-signature')].map(e => e.innerText)")
    shaped = [text for text in texts if 'tokens: Float[Array, "tokens dim"]' in text]
    assert len(shaped) >= 6


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_accessible(browser, scheme):
    axe = resources.files("axe_core_python").joinpath("axe.min.js").read_text()
    browser.look(DESKTOP, scheme)
    wrong = {}
    for page in HANDFUL:
        browser.open(page)
        browser.driver.execute_script(axe)
        found = browser.driver.execute_async_script(
            "axe.run({exclude: [['details']]}, {resultTypes: ['violations']})"
            ".then(arguments[arguments.length - 1])"
        )
        serious = {
            violation["id"]: [(n["target"], n["failureSummary"]) for n in violation["nodes"]][:3]
            for violation in found["violations"]
            if violation["impact"] in ("serious", "critical")
        }
        if serious:
            wrong[page] = serious
    assert not wrong


def test_no_link_is_broken(base, tmp_path):
    settings = tmp_path / "linkcheckerrc"
    settings.write_text(
        "[AnchorCheck]\n"
        "[checking]\nmaxrequestspersecond=10000\n"
        "[filtering]\nignorewarnings=http-redirected\n"
    )
    command = [sys.executable, "-m", "linkcheck", "-f", str(settings), "--no-status", base]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    # A checker that saw next to nothing would find nothing wrong.
    assert int(re.findall(r"(\d+) links in (\d+) URLs", done.stdout)[-1][1]) > len(pages())


def test_inventory_holds_every_public_name():
    raw = (SITE / "objects.inv").read_bytes()
    body = zlib.decompress(raw.split(b"\n", 4)[4]).decode()
    there = {line.split(" ")[0] for line in body.splitlines()}
    missing = []
    for name, thing in public_names().items():
        canonical = f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', '')}"
        if not {name, canonical} & there:
            missing.append(name)
    assert not missing
    modules = {name for name in documented() if inspect.ismodule(resolve(name))}
    assert set(documented()) - modules <= there
