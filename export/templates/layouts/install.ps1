# Checks every file of this folder, compiles engines for this PC's RTX GPU, and compares them with the golden outputs.
# Run it again at any time: what is up to date is not compiled again. Arguments go to build_engine.py, such as --target onnx-int8.
# Exit code 0: done. 1: a file, a build or a test failed. 3: this machine lacks something.
$ErrorActionPreference = "Stop"
Set-Location -LiteralPath $PSScriptRoot

if (-not (Get-Command python -ErrorAction SilentlyContinue)) {
    Write-Host "install.ps1: python is missing; install 64-bit Python 3.9 or newer"
    exit 3
}

Write-Host "1 of 4: hashes"
foreach ($line in Get-Content -LiteralPath SHA256SUMS) {
    $hash = $line.Substring(0, 64)
    $name = $line.Substring(66)
    if (-not (Test-Path -LiteralPath $name) -or (Get-FileHash -Algorithm SHA256 -LiteralPath $name).Hash -ne $hash) {
        Write-Host "install.ps1: $name is missing or was changed; copy the folder again"
        exit 1
    }
}

Write-Host "2 of 4: packages"
if (-not (Test-Path -LiteralPath env)) { python -m venv env }
if ($LASTEXITCODE) { exit 3 }
$python = ".\env\Scripts\python.exe"
& $python -m pip install --quiet --disable-pip-version-check -r requirements.txt
if ($LASTEXITCODE) {
    Write-Host "install.ps1: pip could not install requirements.txt; see above"
    exit 3
}

Write-Host "3 of 4: engines"
& $python -I -B bundle\build_engine.py --runtime tensorrt_rtx --out engines @args
$built = $LASTEXITCODE
if ($built -gt 1) { exit $built }

Write-Host "4 of 4: golden outputs"
& $python -I -B bundle\selftest.py --engines engines
if ($LASTEXITCODE) { exit $LASTEXITCODE }
exit $built
