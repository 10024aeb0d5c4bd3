"""Whether a server can be reached, found in seconds; standard library only."""

import http.client
import ssl
import threading
import urllib.error
import urllib.request

SECONDS = 4.0


def unreachable(url: str) -> str:
    """Why nothing at a URL answers within `SECONDS`, or ''. Asks through the proxy that the environment names.

    The question is asked in a thread, which is left alone then: looking a name up heeds no timeout.
    """
    answers = [f"no answer within {SECONDS:g} s"]
    asking = threading.Thread(target=lambda: answers.append(_ask(url)), daemon=True)
    asking.start()
    asking.join(SECONDS)
    return answers[-1]


def _ask(url: str) -> str:
    asking = urllib.request.build_opener()  # urlopen would keep the proxy of its first call
    try:
        asking.open(urllib.request.Request(url, method="HEAD"), timeout=SECONDS).close()
    except urllib.error.HTTPError as error:
        return f"answers {error.code} {error.reason}" if error.code >= 500 else ""
    except urllib.error.URLError as error:
        # a server is there; whether its certificate will do is for those to judge who bring their own list of them
        return "" if isinstance(error.reason, ssl.SSLCertVerificationError) else _words(error.reason)
    except (OSError, ValueError, http.client.HTTPException) as error:
        return _words(error)
    return ""


def _words(reason: object) -> str:
    return (reason.strerror if isinstance(reason, OSError) else None) or str(reason) or type(reason).__name__
