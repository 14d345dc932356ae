// Image in, features out, with OpenVINO and nothing else. The preprocessing is that of preprocess.py, resize bit for bit as Pillow's.
//
//     make                                     needs `pip install openvino`, whose package holds headers and libraries
//     ./features ../../artifacts/onnx-fp32/model_224.onnx image.ppm --size 224 --resize 256 --out features.bin
//
// The settings (--size, --resize, --interpolation, --normalize, --fit) of each resolution are in preprocess.json. The picture is a binary
// PPM (P6, 8 bits); any other becomes one by: python -c "from PIL import Image; Image.open('a.png').convert('RGB').save('a.ppm')"
// Without --out, the features of the whole image are printed, one number a line; with it, every output of the network is appended to the
// file as float32, in the order printed. Exit code 0, 1 (OpenVINO failed) or 2 (wrong arguments or picture).

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include <openvino/openvino.hpp>

struct Image {
    int width, height;
    std::vector<uint8_t> pixels;  // row by row, red green blue
};

struct WrongInput : std::runtime_error {
    using std::runtime_error::runtime_error;
};

Image read_ppm(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw WrongInput("There is no picture " + path + ".");
    auto number = [&] {
        while (std::isspace(file.peek()) || file.peek() == '#') {
            std::string comment;
            file.peek() == '#' ? (void)std::getline(file, comment) : (void)file.get();
        }
        int value = 0;
        file >> value;
        return value;
    };
    std::string magic(2, ' ');
    file.read(&magic[0], 2);
    const int width = number(), height = number(), top = number();
    file.get();
    const bool sound = file && width > 0 && height > 0 && width <= 65535 && height <= 65535;
    if (magic != "P6" || top != 255 || !sound) throw WrongInput(path + " is no binary PPM (P6) of 8 bits.");
    Image image{width, height, std::vector<uint8_t>(size_t(width) * height * 3)};
    file.read(reinterpret_cast<char*>(image.pixels.data()), std::streamsize(image.pixels.size()));
    if (!file) throw WrongInput(path + " ends early.");
    return image;
}

// Pillow's filters (Resample.c): support in pixels of the smaller grid, and the weight at a distance.
double bilinear(double x) { return std::max(0.0, 1.0 - std::abs(x)); }

double bicubic(double x) {
    const double a = -0.5;
    x = std::abs(x);
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    return x < 2.0 ? (((x - 5) * x + 8) * x - 4) * a : 0.0;
}

double lanczos(double x) {
    auto sinc = [](double v) { return v == 0.0 ? 1.0 : std::sin(v * M_PI) / (v * M_PI); };
    return -3.0 <= x && x < 3.0 ? sinc(x) * sinc(x / 3) : 0.0;
}

struct Filter {
    double support;
    double (*weight)(double);
};

const std::map<std::string, Filter> FILTERS = {{"bilinear", {1, bilinear}}, {"bicubic", {2, bicubic}}, {"lanczos", {3, lanczos}}};

struct Row {
    int first;                 // of the input
    std::vector<int> weights;  // 22-bit fixed point
};

std::vector<Row> weights(int in, int out, const Filter& filter) {
    const double scale = double(in) / out, stretch = std::max(scale, 1.0), support = filter.support * stretch;
    std::vector<Row> rows;
    for (int i = 0; i < out; i++) {
        const double centre = (i + 0.5) * scale;
        const int first = std::max(0, int(centre - support + 0.5)), last = std::min(in, int(centre + support + 0.5));
        std::vector<double> exact;
        double sum = 0;
        for (int j = first; j < last; j++) {
            exact.push_back(filter.weight((j - centre + 0.5) * (1.0 / stretch)));
            sum += exact.back();
        }
        Row row{first, {}};
        for (double w : exact) {
            if (sum != 0.0) w /= sum;
            row.weights.push_back(int((w < 0 ? -0.5 : 0.5) + w * (1 << 22)));
        }
        rows.push_back(row);
    }
    return rows;
}

uint8_t grey(int sum) { return uint8_t(std::clamp(sum >> 22, 0, 255)); }

Image resize(const Image& in, int width, int height, const Filter& filter) {
    Image wide = in;
    if (width != in.width) {
        wide = {width, in.height, std::vector<uint8_t>(size_t(width) * in.height * 3)};
        const auto columns = weights(in.width, width, filter);
        for (int y = 0; y < in.height; y++)
            for (int x = 0; x < width; x++)
                for (int c = 0; c < 3; c++) {
                    int sum = 1 << 21;
                    for (size_t k = 0; k < columns[x].weights.size(); k++)
                        sum += in.pixels[(size_t(y) * in.width + columns[x].first + k) * 3 + c] * columns[x].weights[k];
                    wide.pixels[(size_t(y) * width + x) * 3 + c] = grey(sum);
                }
    }
    if (height == in.height) return wide;
    Image out{width, height, std::vector<uint8_t>(size_t(width) * height * 3)};
    const auto rows = weights(in.height, height, filter);
    for (int y = 0; y < height; y++)
        for (int x = 0; x < width * 3; x++) {
            int sum = 1 << 21;
            for (size_t k = 0; k < rows[y].weights.size(); k++)
                sum += wide.pixels[(size_t(rows[y].first) + k) * width * 3 + x] * rows[y].weights[k];
            out.pixels[size_t(y) * width * 3 + x] = grey(sum);
        }
    return out;
}

struct Preprocess {
    int size = 0, resize = 0;
    std::string interpolation = "bicubic", normalize = "imagenet", fit = "crop";
};

const std::map<std::string, std::array<std::array<float, 3>, 2>> CONSTANTS = {
    {"imagenet", {{{0.485f, 0.456f, 0.406f}, {0.229f, 0.224f, 0.225f}}}},
    {"inception", {{{0.5f, 0.5f, 0.5f}, {0.5f, 0.5f, 0.5f}}}},
    {"clip", {{{0.48145466f, 0.4578275f, 0.40821073f}, {0.26862954f, 0.26130258f, 0.27577711f}}}},
    {"satellite", {{{0.430f, 0.411f, 0.296f}, {0.213f, 0.156f, 0.143f}}}},
    {"none", {{{0, 0, 0}, {1, 1, 1}}}},
};

// [3, size, size], as Preprocess.__call__ of preprocess.py
std::vector<float> preprocessed(const Image& image, const Preprocess& how) {
    int width = how.size, height = how.size;
    if (how.fit == "crop") {
        const double scale = double(how.resize) / std::min(image.width, image.height);
        width = std::max(how.size, int(std::nearbyint(image.width * scale)));  // to even, as Python's round
        height = std::max(how.size, int(std::nearbyint(image.height * scale)));
    }
    const Image resized = resize(image, width, height, FILTERS.at(how.interpolation));
    const int left = (width - how.size) / 2, top = (height - how.size) / 2;
    const size_t area = size_t(how.size) * how.size;
    std::vector<float> planes(3 * area);
    for (int c = 0; c < 3; c++) {
        float* plane = planes.data() + c * area;
        for (int y = 0; y < how.size; y++)
            for (int x = 0; x < how.size; x++)
                plane[y * how.size + x] = resized.pixels[(size_t(top + y) * width + left + x) * 3 + c] / 255.0f;
        float mean, deviation;
        if (how.normalize == "per_image") {
            double sum = 0, squares = 0;
            for (size_t i = 0; i < area; i++) sum += plane[i];
            mean = float(sum / area);
            for (size_t i = 0; i < area; i++) squares += (plane[i] - mean) * (plane[i] - mean);
            deviation = float(std::sqrt(squares / area)) + 1e-3f;
        } else {
            mean = CONSTANTS.at(how.normalize)[0][c];
            deviation = CONSTANTS.at(how.normalize)[1][c];
        }
        for (size_t i = 0; i < area; i++) plane[i] = (plane[i] - mean) / deviation;
    }
    return planes;
}

struct Arguments {
    std::string model, picture, out, precision = "f32";
    Preprocess preprocess;
};

int positive(const std::string& name, const std::string& text) {
    if (text.empty() || text.size() > 5 || text.find_first_not_of("0123456789") != std::string::npos || std::stoi(text) < 1)
        throw WrongInput(name + " must be a number of pixels, got " + text + ".");
    return std::stoi(text);
}

Arguments parse(int argc, char** argv) {
    Arguments a;
    std::vector<std::string> plain;
    for (int i = 1; i < argc; i++) {
        const std::string name = argv[i];
        if (name.rfind("--", 0) != 0) {
            plain.push_back(name);
            continue;
        }
        if (++i >= argc) throw WrongInput(name + " needs a value.");
        const std::string value = argv[i];
        if (name == "--size") a.preprocess.size = positive(name, value);
        else if (name == "--resize") a.preprocess.resize = positive(name, value);
        else if (name == "--interpolation") a.preprocess.interpolation = value;
        else if (name == "--normalize") a.preprocess.normalize = value;
        else if (name == "--fit") a.preprocess.fit = value;
        else if (name == "--precision") a.precision = value;
        else if (name == "--out") a.out = value;
        else throw WrongInput("There is no option " + name + ".");
    }
    const Preprocess& p = a.preprocess;
    if (plain.size() != 2 || !p.size || !p.resize)
        throw WrongInput("Usage: features MODEL.onnx PICTURE.ppm --size S --resize R [--interpolation bicubic] [--normalize imagenet]"
                         " [--fit crop] [--precision f32] [--out FILE]");
    if (!FILTERS.count(p.interpolation)) throw WrongInput("--interpolation must be bilinear, bicubic or lanczos.");
    if (!CONSTANTS.count(p.normalize) && p.normalize != "per_image")
        throw WrongInput("--normalize must be imagenet, inception, clip, satellite, per_image or none.");
    if (p.fit != "crop" && p.fit != "squash") throw WrongInput("--fit must be crop or squash.");
    a.model = plain[0];
    a.picture = plain[1];
    return a;
}

void run(const Arguments& a) {
    std::vector<float> planes = preprocessed(read_ppm(a.picture), a.preprocess);
    const size_t size = size_t(a.preprocess.size);
    ov::Core core;
    ov::CompiledModel model = core.compile_model(
        a.model, "CPU", {{"PERFORMANCE_HINT", "LATENCY"}, {"INFERENCE_PRECISION_HINT", a.precision}});
    ov::InferRequest request = model.create_infer_request();
    request.set_input_tensor(ov::Tensor(ov::element::f32, {1, 3, size, size}, planes.data()));
    request.infer();
    std::ofstream file;
    if (!a.out.empty()) file.open(a.out, std::ios::binary);
    for (const auto& output : model.outputs()) {
        const ov::Tensor tensor = request.get_tensor(output);
        const float* values = tensor.data<float>();
        if (file.is_open()) {
            file.write(reinterpret_cast<const char*>(values), std::streamsize(tensor.get_byte_size()));
            std::cout << output.get_any_name() << " " << tensor.get_shape() << "\n";
        } else if (output.get_any_name() == "cls") {
            for (size_t i = 0; i < tensor.get_size(); i++) std::printf("%.9g\n", values[i]);
        }
    }
    if (!a.out.empty() && !file.flush()) throw WrongInput(a.out + " could not be written.");
}

int main(int argc, char** argv) {
    try {
        run(parse(argc, argv));
    } catch (const WrongInput& e) {
        std::cerr << e.what() << "\n";
        return 2;
    } catch (const std::exception& e) {
        std::cerr << "OpenVINO failed: " << e.what() << "\n";
        return 1;
    }
}
